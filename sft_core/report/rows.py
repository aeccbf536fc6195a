"""The rows of a report: scores, what each phase changes, and what thinking gains. Sees plain numbers only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypedDict

Cell = str | int | float | None
_BEFORE_SCORES, _AFTER_SCORES = ("task", "metric", "n"), ("stderr", "difference", "low", "high", "flags")


class Score(TypedDict):
    """A score as an evaluation's scores.json has it: a mean over n rows with its standard error."""

    metric: str
    value: float
    stderr: float | None
    n: int


class PhaseChange(TypedDict):
    """How the phase's model differs from the one before it, with a 95 % interval."""

    task: str
    metric: str
    phase: str
    before: str
    value: float
    low: float | None
    high: float | None


ThinkingGain = TypedDict(
    "ThinkingGain",
    {
        "task": str,
        "n": int,
        "no_think": float,
        "think": float,
        "gain": float,
        "low": float,
        "high": float,
        "tokens no_think": float,
        "tokens think": float,
        "cut off no_think": float,
        "cut off think": float,
    },
)


@dataclasses.dataclass(frozen=True)
class ScoreRow:
    """A task's score by one metric.

    by_model: the start model first, then the checkpoint of each phase; the last one is released. stderr: the last
    model's standard error. difference: last - first; low and high: its 95 % interval. flags: what a reader must not
    overlook, in words.
    """

    task: str
    metric: str
    n: int
    by_model: dict[str, float]
    stderr: float | None
    difference: float | None
    low: float | None
    high: float | None
    flags: str | None = None

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> ScoreRow:
        """row: as to_json gives it; every key that is no field is a model."""
        fields = {name: row[name] for name in (*_BEFORE_SCORES, *_AFTER_SCORES)}
        return cls(**fields, by_model={name: value for name, value in row.items() if name not in fields})

    def to_json(self) -> dict[str, Cell]:
        """A flat row: each score is under its model's name, between n and stderr."""
        before, after = ({name: getattr(self, name) for name in names} for names in (_BEFORE_SCORES, _AFTER_SCORES))
        return {**before, **self.by_model, **after}

    @property
    def models(self) -> list[str]:
        return list(self.by_model)


@dataclasses.dataclass(frozen=True)
class OverviewRow:
    """A task's losses and one score of its answers, each by model; the difference is the score's, or else the loss's.

    metric and scores are None where the task has no answers, losses where it has no loss.
    """

    task: str
    n: int
    losses: dict[str, float | None]
    metric: str | None
    scores: dict[str, float | None]
    difference: float | None
    low: float | None
    high: float | None
    flags: str | None

    def to_json(self) -> dict[str, Cell]:
        """A flat row, for a table."""
        return {
            "task": self.task,
            "n": self.n,
            **{f"{model} loss": loss for model, loss in self.losses.items()},
            "metric": self.metric,
            **self.scores,
            **{name: getattr(self, name) for name in ("difference", "low", "high", "flags")},
        }
