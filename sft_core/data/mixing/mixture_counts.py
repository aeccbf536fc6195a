"""Counts of the mixture. They have a module of their own, so that readers do not import the builder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from sft_core.counts import Counts
from sft_core.data.mixing.shares import SourceRequest

AMOUNTS = ("rows", "tokens", "trained_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitCounts(Counts):
    """Token rows of a source. rows = train + selection + report; train = without_trained_token + the reasons of
    exclusions.py + available."""

    rows: int
    train: int
    selection: int
    report: int
    without_trained_token: int = 0
    duplicates: int = 0
    contaminated: int = 0
    available: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedSource(SplitCounts):
    """A source in the mixture: its rows, the recipe's request, and the rows that are kept."""

    weight: float | None
    num_rows: int | None
    trained_token_share: float | None = None
    kept: int
    tokens: int
    trained_tokens: int
    rows_by_tokens: dict[str, int] = dataclasses.field(default_factory=dict)  # see lengths.py
    rows_by_trained_tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    repeats: float = 1.0
    requested: dict[str, float]  # shares by AMOUNTS
    achieved: dict[str, float]
    rows_read: int | None = None  # None: the mixture is not built
    rejected: dict[str, dict[str, int]] | None = None  # by step and reason

    def share(self, amount: str) -> tuple[float, float]:
        """Requested and achieved."""
        return self.requested[amount], self.achieved[amount]

    def request(self, name: str) -> SourceRequest:
        """name: of the source."""
        return {
            "name": name,
            "weight": self.weight,
            "num_rows": self.num_rows,
            "trained_token_share": self.trained_token_share,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget(Counts):
    """Trained tokens of a mixture by trained_token_share."""

    num_trained_tokens: int
    within_reach: int
    max_repeats: float
    held_at_max_repeats: list[str]  # sources


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureCounts(Counts):
    rows: int
    tokens: int
    trained_tokens: int
    sources: dict[str, MixedSource]
    budget: Budget | None = None  # None, and not in the JSON, unless by trained_token_share

    def to_json(self) -> dict[str, Any]:
        values = super().to_json()
        return values if self.budget else {name: value for name, value in values.items() if name != "budget"}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        sources = {name: MixedSource.from_json(counts) for name, counts in values["sources"].items()}
        budget = Budget.from_json(values["budget"]) if values.get("budget") else None
        return super().from_json({**values, "sources": sources, "budget": budget})
