"""Counts in the manifests of evaluations and of the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from sft_core.counts import Counts
from sft_core.report.rows import PhaseChange, Score, ScoreRow, ThinkingGain

if TYPE_CHECKING:
    from sft_core.store.stage import Json


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluatedCounts(Counts):
    """Of a task that is a source."""

    rows: int
    over_long: int  # rows whose losses are of their first tokens
    answers: int
    empty: int  # answers without text outside of thinking
    cut_off: int
    generated_tokens: float | None  # mean of an answer; None without answers
    documents: Literal["alone"] | None = None  # None: together in a forward
    timeouts: int = 0
    engine: str | None = None
    metric: str | None = None
    scores: list[Score]

    def to_json(self) -> dict[str, Json]:
        values = super().to_json()
        if self.documents is None:
            del values["documents"]  # for most models the manifest stays as it was before the key
        return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarnessCounts(Counts):
    """Of a task of the lm-evaluation-harness."""

    rows: int  # documents
    prompts: int  # a document has several where it is a choice
    cut: int  # prompts that are longer than the context
    num_fewshot: int | str  # examples before each question; "1 to 5" where members of a group differ
    scores: list[Score]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportCounts(Counts):
    """Of the report: its tables."""

    scores: list[ScoreRow]
    thinking: list[ThinkingGain]
    phases: list[PhaseChange] = dataclasses.field(default_factory=list)  # empty for a recipe of one phase

    def to_json(self) -> dict[str, Json]:
        values = super().to_json() | {"scores": [row.to_json() for row in self.scores]}
        if not self.phases:
            del values["phases"]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        return super().from_json({**values, "scores": [ScoreRow.from_json(row) for row in values["scores"]]})
