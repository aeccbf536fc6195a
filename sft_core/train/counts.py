"""Counts in the manifest of a training."""

from __future__ import annotations

import dataclasses

from sft_core.counts import Counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedCounts(Counts):
    round: int
    steps: int
    first_loss: float  # a trained token's, of the first and the last logged step
    last_loss: float
