"""Counts of the packs. They have a module of their own, so that readers do not import the builder."""

from __future__ import annotations

import dataclasses

from sft_core.counts import Counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackCounts(Counts):
    packs: int
    documents: int
    tokens: int
    max_length: int
    fill: float  # share of all packs' room
    packs_by_fill: dict[str, int] = dataclasses.field(default_factory=dict)  # whole percents
    packs_by_documents: dict[str, int] = dataclasses.field(default_factory=dict)  # see lengths.py
    documents_by_tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    attention_of_packs: dict[str, int] = dataclasses.field(default_factory=dict)  # least, mean, most token pairs
    dropped: dict[str, int]  # over-long rows, by source
    truncated: dict[str, int]
    split: dict[str, int] = dataclasses.field(default_factory=dict)
    windows: dict[str, int] = dataclasses.field(default_factory=dict)
