"""The load-balancing loss of a mixture of experts (Switch Transformer, arXiv 2101.03961), exact over a global batch.

A product of two means over tokens is not a sum over micro-batches. So the loss is computed for each pack separately and
weighted by the pack's tokens: ranks, accumulation and the packs of a forward do not change it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from sft_core.train.collate import Batch


@dataclasses.dataclass(frozen=True)
class RouterLoss:
    """coefficient: the weight of this loss in the total loss. top_k: experts of a token."""

    coefficient: float
    top_k: int

    def logits_of(self, outputs: Any) -> tuple[torch.Tensor, ...]:
        """The router's logits of each layer with experts, each of shape (tokens, experts)."""
        return outputs["router_logits"]

    def total(self, of_forwards: Sequence[tuple[torch.Tensor, ...]], batch: Batch) -> torch.Tensor:
        """The sum over the batch's packs of tokens x loss: 0-d. of_forwards: logits, forward after forward."""
        layers = [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*of_forwards, strict=True)]
        total = 0.0 * sum(layer.sum() for layer in layers)  # an empty batch takes part in the backward pass
        assert isinstance(total, torch.Tensor)
        starts = [0, *batch["pack_sizes"].cumsum().tolist()]
        ends = [0, *batch["lengths"].cumsum().tolist()]
        for first, last in itertools.pairwise(starts):
            tokens = slice(ends[first], ends[last])
            total = total + (tokens.stop - tokens.start) * self.of(tuple(layer[tokens] for layer in layers))
        return total

    def of(self, layers: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The loss of one pack, as transformers computes it of one forward."""
        loss = load_balancing_loss_func(layers, layers[0].shape[-1], self.top_k)  # type: ignore[arg-type]
        assert isinstance(loss, torch.Tensor)
        return loss


def router_loss(config: Any, asked: float | None) -> RouterLoss | None:
    """The router's loss of a model; None for a model without experts or a coefficient of 0.

    asked: training.router_aux_loss_coef; None: the model's own. Raises ValueError for a coefficient other than 0 if the
    model has no router.
    """
    text = config.get_text_config()
    if not hasattr(text, "output_router_logits"):
        if asked:
            raise ValueError(
                f"training.router_aux_loss_coef: found {asked}, and a {text.model_type} model gives no router's "
                "logits; remove it"
            )
        return None
    coefficient = getattr(text, "router_aux_loss_coef", 0.0) if asked is None else asked
    top_k = getattr(text, "num_experts_per_tok", None)
    if not coefficient:
        return None
    if not isinstance(top_k, int):
        raise ValueError(
            f"training.router_aux_loss_coef: the config of a {text.model_type} model does not tell how many experts a "
            "token has (num_experts_per_tok); set it to 0"
        )
    return RouterLoss(coefficient, top_k)


@contextlib.contextmanager
def router_config_kept(config: Any) -> Iterator[None]:
    """Restores the router's keys of a config. TRL sets them for its own loss, and checkpoints must not contain that."""
    names = [name for name in ("output_router_logits", "router_aux_loss_coef") if hasattr(config, name)]
    before = {name: getattr(config, name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
