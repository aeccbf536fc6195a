"""Roll-outs, their curves and the decisions of a search: plain values, without weights, files or clocks.

A strategy proposes a roll-out, observes its curves, and proposes again until it is done. Its proposals depend on the
observed curves alone, so replaying the curves in order leads to the same next roll-out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from sft_core.rounds import Point, Rollout


@dataclasses.dataclass(frozen=True)
class Curves:
    """The selection scores of every task over a roll-out, trained or not. Higher is better.

    epochs: shape (evaluations,), from 0 on. rows: each task's scores by row, shape (evaluations, rows), always of the
    same rows; a task's score is their mean. Raises ValueError for scores that are no numbers or do not fit epochs.
    """

    epochs: Sequence[float]
    rows: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        for task, scores in self.rows.items():
            if scores.ndim != 2 or len(scores) != len(self.epochs) or scores.shape[1] == 0:
                raise ValueError(f"{task}: found scores of shape {scores.shape} for {len(self.epochs)} evaluations")
            if not np.isfinite(scores).all():
                raise ValueError(f"{task}: a selection score is not a number; the training has diverged")

    def of(self, task: str) -> np.ndarray:
        """The task's score at each evaluation: shape (evaluations,)."""
        return self.rows[task].mean(axis=1)

    def pooled(self) -> np.ndarray:
        """The mean over all rows of all tasks: shape (evaluations,)."""
        return np.concatenate(list(self.rows.values()), axis=1).mean(axis=1)

    def until(self, evaluation: int) -> Curves:
        """The first evaluations, up to and with number `evaluation`."""
        return Curves(self.epochs[: evaluation + 1], {task: rows[: evaluation + 1] for task, rows in self.rows.items()})


@dataclasses.dataclass(frozen=True)
class Decision:
    """The decision after a roll-out. evidence: by task, the numbers on which it rests."""

    round: int
    dropped: tuple[str, ...]
    readmitted: tuple[str, ...]
    start: Point  # of the next roll-out
    epochs: float  # of kept training up to `start`, over all roll-outs
    reason: str
    evidence: Mapping[str, Mapping[str, float]]


class Search(Protocol):
    """A strategy. Call its methods in turn: propose, observe, propose, ..."""

    def propose(self) -> Rollout | None:
        """The next roll-out, the same until `observe` is called; None when the search is over."""

    def observe(self, curves: Curves) -> Decision:
        """Takes in the curves of the proposed roll-out, and decides."""

    def wanted(self, curves: Curves) -> set[int]:
        """Evaluations of an unfinished roll-out whose weights the search may still need."""

    def kept(self, curves: Curves) -> set[int]:
        """Evaluations of a finished roll-out, not observed yet, whose weights the search needs."""

    def is_decided(self, curves: Curves) -> bool:
        """Whether an unfinished roll-out can end before its last epoch."""

    @property
    def best(self) -> Point | None:
        """The weights to deliver, of all evaluations so far."""

    @property
    def ended_by(self) -> str | None:
        """The reason why the search is over, in a sentence; None while it goes on."""


@dataclasses.dataclass
class Best:
    """The evaluation with the highest pooled score over all roll-outs; the first of equal ones."""

    point: Point | None = None
    score: float = -np.inf

    def see(self, round: int, curves: Curves) -> None:
        pooled = curves.pooled()
        evaluation = int(np.argmax(pooled))
        if pooled[evaluation] > self.score:
            self.point, self.score = Point(round, evaluation), float(pooled[evaluation])

    def would_be(self, curves: Curves) -> set[int]:
        evaluation = int(np.argmax(curves.pooled()))
        return {evaluation} if curves.pooled()[evaluation] > self.score else set()


def replay(search: Search, journal: Iterable[Curves]) -> list[Decision]:
    """Lets the search observe the curves of its roll-outs so far. Raises ValueError for more curves than roll-outs."""
    decisions: list[Decision] = []
    for curves in journal:
        if search.propose() is None:
            raise ValueError(f"the journal has more roll-outs than the {len(decisions)} that the search would run")
        decisions.append(search.observe(curves))
    return decisions
