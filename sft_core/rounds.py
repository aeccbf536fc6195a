"""Rounds of training: the decisions of a search, as plain values that every layer reads.

A phase without a search has one round, over all its rows. A search has a round for each roll-out that it proposes:
sft_core/search decides them, and steps/search.py reads them off the store.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

BASE = "base"  # the start model's name in scores
ONLY = "tuned"  # the name of the phase of a recipe without `phases`, which is also its model's name in scores


class Point(NamedTuple):
    """The weights of a roll-out at its evaluation number `evaluation`; 0 is the roll-out's start."""

    round: int
    evaluation: int


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A training of some tasks, with a new optimizer, from the weights at `start`; None: the phase's start weights."""

    round: int
    start: Point | None
    active: tuple[str, ...]  # the tasks whose rows are trained
    epochs: float  # passes over the active rows
    rows: Mapping[str, int] | None = None  # of each active task in an epoch; None: all of its rows, once


@dataclasses.dataclass(frozen=True)
class Rounds:
    """The rounds of a phase with a search: the finished ones and the next one.

    best: the weights that the phase ends with; None while the search goes on. sizes: rows of each task in an epoch of
    the whole mixture; empty before the mixture is built.
    """

    rollouts: tuple[Rollout, ...] = ()
    best: Point | None = None
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
