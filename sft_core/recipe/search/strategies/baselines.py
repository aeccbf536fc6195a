"""SFT, Continual SFT, SRO SFT and Soft SRO: strategies without settings."""

from __future__ import annotations

from sft_core.recipe.search.strategy import Needs, Strategy

STRATEGIES = {
    "sft": Strategy(Needs(any_scheduler=True)),
    "continual": Strategy(),
    "sro": Strategy(),
    "soft_sro": Strategy(Needs(sizes=True)),
}
