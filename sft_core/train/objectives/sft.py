"""Supervised fine-tuning: the mean negative log-likelihood of the trained tokens of a global batch."""

from __future__ import annotations

import torch

from sft_core.train.collate import Batch


class Sft:
    """L = -1/W * sum of w * log p over the trained tokens, where W is the sum of their weights w.

    A token's weight is its turn's, 1 unless the data gives another: then W is the number of tokens.
    """

    def amount(self, batch: Batch) -> float:
        return batch["weight"]

    def total(self, nll_N: torch.Tensor, batch: Batch) -> torch.Tensor:
        return (nll_N * batch["weights"]).sum()
