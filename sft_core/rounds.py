"""Rounds of training: what a search decided, as plain values that every layer reads.

A phase without a search has one round over everything. A search makes as many as it proposes; sft_core/search decides
them and steps/search.py reads them off the store.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

BASE = "base"  # the start model, where the models that are scored are named
ONLY = "tuned"  # the phase of a recipe without `phases`, by the name that its scores have


class Point(NamedTuple):
    """Weights that a roll-out went through: those of its evaluation number `evaluation`, 0 being its start."""

    round: int
    evaluation: int


@dataclasses.dataclass(frozen=True)
class Rollout:
    """What to train next, with a new optimizer, from the weights at `start` (None: the phase's own)."""

    round: int
    start: Point | None
    active: tuple[str, ...]  # the tasks whose rows are trained
    epochs: float  # passes over the active rows
    rows: Mapping[str, int] | None = None  # of each active task in an epoch; None: all of its rows, once


@dataclasses.dataclass(frozen=True)
class Rounds:
    """The rounds of a phase that a search makes: those that are done, and the next one.

    best: the weights that the phase ends with; None while the search goes on. sizes: rows of each task in an epoch of
    the whole mixture; empty while the mixture is not there.
    """

    rollouts: tuple[Rollout, ...] = ()
    best: Point | None = None
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
