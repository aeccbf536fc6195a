"""The loss of trained tokens, and nothing but them: logits are made for their positions alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sft_core.train.collate import IGNORED

# B is 1 (one sequence of documents), T its tokens, N the trained ones among them, V the vocabulary.


def trained_token_nll(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], *, fused_lm_head: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of each trained token and its position: float32 (N,) and int64 (N,).

    batch: input_ids, position_ids, labels, int64 (B, T). The cache is off: with one, transformers lets
    documents of a pack attend to each other. fused_lm_head: the model has TRL's tiled head, which on a GPU
    never holds all logits at once.
    """
    if fused_lm_head:
        targets_N = _targets(batch)
        log_probs_BT = model(**_inputs(batch), labels=batch["labels"], fused_lm_head=True).log_probs
        return -log_probs_BT[0, targets_N - 1].float(), targets_N
    logits_NV, targets_N = trained_token_logits(model, batch)
    return F.cross_entropy(logits_NV, batch["labels"][0, targets_N], reduction="none"), targets_N


def trained_token_logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits from which each trained token is predicted, and its position: float32 (N, V) and int64 (N,)."""
    targets_N = _targets(batch)
    logits_NV = model(**_inputs(batch), logits_to_keep=targets_N - 1, use_cache=False).logits[0]
    return logits_NV.float(), targets_N


def _targets(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    targets_N = (batch["labels"][0] != IGNORED).nonzero().squeeze(1)
    assert len(targets_N) == 0 or int(targets_N[0]) > 0, "the first token of a document is never a target"
    return targets_N


def _inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in ("input_ids", "position_ids")}


class LossBySource:
    """Sums of loss and counts of tokens for each source since the last `take`, over all ranks."""

    def __init__(self, num_sources: int):
        self._num_sources = num_sources
        self._sums: torch.Tensor | None = None

    def add(self, nll_N: torch.Tensor, source_N: torch.Tensor) -> None:
        if self._sums is None:
            self._sums = torch.zeros(2, self._num_sources, dtype=torch.float64, device=nll_N.device)
        self._sums[0].index_add_(0, source_N, nll_N.detach().double())
        self._sums[1].index_add_(0, source_N, torch.ones_like(nll_N, dtype=torch.float64))

    @property
    def sums(self) -> torch.Tensor:
        """(2, sources): of losses and of tokens on this rank."""
        assert self._sums is not None
        return self._sums

    def go_on_from(self, sums: torch.Tensor) -> None:
        self._sums = sums

    def take(self, reduce: object) -> tuple[list[float], list[int]]:
        """(mean loss, trained tokens) of each source; `reduce` sums a tensor over the ranks."""
        assert callable(reduce)
        total = reduce(self.sums)
        self._sums = torch.zeros_like(self.sums)
        means = (total[0] / total[1]).tolist()
        return means, [int(count) for count in total[1].tolist()]
