"""Counts of the download stage. They have a module of their own, so that readers do not import the builder."""

from __future__ import annotations

import dataclasses

from sft_core.counts import Counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversationCounts(Counts):
    rows: int  # read from the source
    conversations: int
    rejected: dict[str, int]  # by reason
