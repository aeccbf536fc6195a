"""The strategies by their names in a recipe."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from sft_core.search.baselines import Continual, Sft, SoftSro, Sro
from sft_core.search.msft import Limits, Msft, RobustMsft
from sft_core.search.rollouts import Search

CAPS = ("max_rollouts", "max_epochs", "max_idle")  # where a search ends: nothing that a roll-out itself depends on


def make_search(settings: Mapping[str, Any], tasks: Sequence[str], sizes: Mapping[str, int]) -> Search:
    """settings: the keys of a recipe's search; without its caps a search that nothing ends.

    sizes: training rows of each task, which soft_sro alone asks for.
    """
    epochs = settings["epochs_per_rollout"]
    match settings["strategy"]:
        case "sft" | "dynamix" | "ies":  # the last two: one roll-out whose sampler learns, see samplers.py
            return Sft(tasks, epochs)
        case "continual":
            return Continual(tasks, epochs)
        case "sro":
            return Sro(tasks, epochs)
        case "soft_sro":
            return SoftSro(tasks, epochs, sizes)
        case "msft":
            caps = {name: settings.get(name) for name in CAPS}
            limits = Limits(caps["max_rollouts"] or sys.maxsize, caps["max_epochs"], caps["max_idle"])
            if settings["preset"] == "paper":
                return Msft(tasks, epochs, limits)
            own = {name: settings[name] for name in ("alpha", "readmit", "max_kept")}
            return RobustMsft(tasks, epochs, limits, **own)
    raise ValueError(f"search.strategy: found {settings['strategy']!r}")
