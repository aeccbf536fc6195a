"""The implementations of all strategies, by their names in a recipe: each module of strategies/ declares some."""

from __future__ import annotations

from collections.abc import Mapping

from sft_core.recipe.search.registry import declared
from sft_core.search import strategies
from sft_core.search.rollouts import Search
from sft_core.search.strategy import Implementation, SamplerInput, SearchInput
from sft_core.train.hooks import Sampler

IMPLEMENTATIONS: Mapping[str, Implementation] = declared(strategies, "IMPLEMENTATIONS", Implementation)


def make_search(start: SearchInput) -> Search:
    """The search of a recipe, before its first roll-out."""
    return IMPLEMENTATIONS[start.search.strategy].search(start)


def make_sampler(start: SamplerInput) -> Sampler | None:
    """The sampler of a roll-out; None for strategies whose roll-outs have a fixed schedule."""
    make = IMPLEMENTATIONS[start.search.strategy].sampler
    return make(start) if make is not None else None
