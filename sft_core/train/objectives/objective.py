"""The interface of an objective: a differentiable sum over each forward, divided by a sum over the global batch."""

from __future__ import annotations

from typing import Protocol

import torch

from sft_core.train.collate import Batch

# N trained tokens of a forward.


class Objective(Protocol):
    """The loss of a global batch: the sum of `total` divided by the sum of `amount`, over all forwards of all ranks.

    Both are sums over packs, so ranks, accumulation and the number of packs a forward do not change the loss.
    """

    def amount(self, batch: Batch) -> float:
        """The part of a forward's packs in the divisor. Counted on the CPU, before the batch moves to the device."""

    def total(self, nll_N: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The differentiable sum over a forward's packs: 0-d.

        nll_N: float32, negative log-likelihoods of the trained tokens, in the order of `batch["targets"]`. A batch
        without packs has none; its sum is 0 and still depends on nll_N, because every rank joins each backward pass.
        """
