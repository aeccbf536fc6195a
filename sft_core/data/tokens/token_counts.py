"""Counts of the tokenize stage. They have a module of their own, so that readers do not import the builder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from sft_core.counts import Counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProofCounts(Counts):
    """What the mask proof checked. Counts of 0 are not in the JSON."""

    forms: int = 0  # learned
    prompts: int = 0  # served anew
    rows: int = 0
    turns: int = 0

    def to_json(self) -> dict[str, Any]:
        return {name: count for name, count in super().to_json().items() if count}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlierCounts(Counts):
    """What the stages before made of a source's rows."""

    pin: str = ""
    rows: int  # read
    conversations: int = 0
    conversations_split: int = 0
    control_tokens_kept_as_text: int = 0
    rejected: dict[str, dict[str, int]]  # by step and reason


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenCounts(Counts):
    rows: int
    tokens: int
    trained_tokens: int
    duplicated_tokens: int = 0  # context that stands in several rows
    rows_by_tokens: dict[str, int]  # see lengths.py
    rows_by_trained_tokens: dict[str, int]
    proof: ProofCounts
    source: EarlierCounts
    sample: list[tuple[str, bool]] = dataclasses.field(default_factory=list)  # a row in pieces: text, is trained

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "proof": self.proof.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        proof, source = ProofCounts.from_json(values["proof"]), EarlierCounts.from_json(values["source"])
        return super().from_json({**values, "proof": proof, "source": source})
