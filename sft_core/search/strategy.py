"""The two parts of a search strategy: a search that proposes roll-outs, and for some a sampler that draws rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sft_core.data.packing.plan import PackPlan
from sft_core.recipe.search.section import SearchKeys
from sft_core.search.rollouts import Search
from sft_core.train.hooks import Sampler


@dataclasses.dataclass(frozen=True)
class SearchInput:
    """The start of a search.

    search: the recipe's section. sizes: training rows of each task, where the strategy needs them.
    """

    search: SearchKeys
    tasks: Sequence[str]
    sizes: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class SamplerInput:
    """A roll-out's training, for which a sampler draws packs.

    tasks: the trained ones. task: the number of each document's task, int64, shape (documents,).
    max_length: tokens of a pack, where the strategy packs rows anew; None: each row is a pack.
    """

    search: SearchKeys
    tasks: list[str]
    task: np.ndarray
    plan: PackPlan
    num_steps: int
    num_epochs: float
    global_batch_size: int
    max_length: int | None
    seed: int


@dataclasses.dataclass(frozen=True)
class Implementation:
    """The functions of a strategy. sampler: None where a roll-out has a fixed schedule."""

    search: Callable[[SearchInput], Search]
    sampler: Callable[[SamplerInput], Sampler] | None = None
