"""The loss of the trained tokens. Logits are computed only at their positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from sft_core.train.collate import Batch, DocumentInputs, documents_alone, model_inputs
from sft_core.train.models.router import RouterLoss

# T tokens of a batch, N the trained ones among them, V the vocabulary.


@dataclasses.dataclass(frozen=True)
class Forward:
    """How a model is run over a batch.

    document_inputs: the inputs that mark the bounds of documents. alone: each document gets its own forward, because in
    this model documents see each other with any inputs. fused_head: the model has head.add_fused_head's, which on a GPU
    never holds all logits at once. router: the loss of a mixture of experts' router; None: there is none.
    """

    document_inputs: DocumentInputs = "positions"
    alone: bool = False
    fused_head: bool = False
    router: RouterLoss | None = None


class Losses(NamedTuple):
    nll_N: torch.Tensor  # noqa: N815  float32: negative log-likelihood of each trained token
    router: torch.Tensor | None  # 0-d: the sum over packs of tokens x router loss; None without a router's loss


def trained_losses(
    model: torch.nn.Module, batch: Batch, forward: Forward, *, num_forwards: int | None = None
) -> Losses:
    """The losses of a batch.

    num_forwards: how many forwards each rank makes, if each document gets one and ranks share the weights.
    """
    nll, router_logits = [], []
    for part in _parts(batch, forward, num_forwards):
        outputs = _run(model, part, forward)
        nll.append(_nll(outputs, part))
        if forward.router is not None:
            router_logits.append(forward.router.logits_of(outputs))
    total = forward.router.total(router_logits, batch) if forward.router is not None else None
    return Losses(torch.cat(nll) if len(nll) > 1 else nll[0], total)


def trained_token_nll(model: torch.nn.Module, batch: Batch, forward: Forward = Forward()) -> torch.Tensor:
    """Negative log-likelihood of each trained token: float32 (N,)."""
    return trained_losses(model, batch, dataclasses.replace(forward, router=None)).nll_N


def trained_token_logits(model: torch.nn.Module, batch: Batch, forward: Forward = Forward()) -> torch.Tensor:
    """Logits from which each trained token is predicted: float32 (N, V)."""
    plain = dataclasses.replace(forward, fused_head=False, router=None)
    return torch.cat([_logits(_run(model, part, plain), part) for part in _parts(batch, plain, None)])


def _parts(batch: Batch, forward: Forward, num_forwards: int | None) -> Iterator[Batch]:
    if not forward.alone:
        yield batch
        return
    parts = list(documents_alone(batch))
    if forward.router is None:  # a router's loss needs documents without trained tokens, too
        parts = [part for part in parts if len(part["targets"])] or parts[:1]
    yield from parts
    for _ in range(len(parts), num_forwards or 0):  # fill up: in each forward the other ranks wait for this rank
        yield _without_targets(parts[0])


def _without_targets(part: Batch) -> Batch:
    first = slice(0, 2)
    none = {name: part[name][:0] for name in ("targets", "target_ids", "weights", "source", "document")}
    return part | {  # type: ignore[return-value]
        "input_ids": part["input_ids"][:, first],
        "position_ids": part["position_ids"][:, first],
        "seq_idx": part["seq_idx"][:, first],
        "bounds": part["bounds"].clamp(max=2),
        "lengths": part["lengths"].clip(max=2),
        "num_targets": part["num_targets"] * 0,
        **none,
    }


def _run(model: torch.nn.Module, batch: Batch, forward: Forward) -> Any:
    inputs = model_inputs(batch, forward.document_inputs, alone=forward.alone)
    if forward.router is not None:
        inputs["output_router_logits"] = True
    if forward.fused_head:
        return model(**inputs, targets=batch["targets"], target_ids=batch["target_ids"])
    return model(**inputs, logits_to_keep=batch["targets"] - 1)


def _nll(outputs: Any, batch: Batch) -> torch.Tensor:
    if "nll_N" in outputs:
        return outputs["nll_N"]
    return F.cross_entropy(_logits(outputs, batch), batch["target_ids"], reduction="none")


def _logits(outputs: Any, batch: Batch) -> torch.Tensor:
    logits = outputs["logits"][0]
    if len(logits) != len(batch["targets"]):  # this class ignores logits_to_keep
        logits = logits[batch["targets"] - 1]
    return logits.float()


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
