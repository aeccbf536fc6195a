"""A head that never holds all logits: TRL's tiled kernel over the hidden states of trained tokens.

TRL's own patch of `forward` selects them by a mask, for which the host waits twice a forward, and assumes that the head
is a plain linear layer. This patch selects them by their positions.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx

VOCABULARY_TILE = 32_768  # columns of a tile of logits, as TRL has it


def wants_fused_head(device: torch.device) -> bool:
    """Whether the fused head saves anything: on a CPU its kernel is plain torch, slower than plain logits."""
    return device.type == "cuda"


def takes_fused_head(model: Any) -> bool:
    """Whether the head is a plain linear layer. A head that PEFT wraps (added tokens, adapters) is not."""
    return type(model.get_output_embeddings()) is torch.nn.Linear


def add_fused_head(model: Any) -> None:
    """Makes `model(..., targets=places, target_ids=ids)` give {"nll_N": float32 (N,)} and the router's logits if any.

    places: int64 (N,), the trained tokens in one sequence; never the first. Without them forward is unchanged. Call
    it before the model is wrapped for several ranks.
    """
    forward = model.forward
    softcap, scale = logit_transform(model.config.get_text_config())

    @functools.wraps(type(model).forward)
    def with_targets(
        self: Any, *args: Any, targets: torch.Tensor | None = None, target_ids: Any = None, **kwargs: Any
    ) -> Any:
        if targets is None:
            return forward(*args, **kwargs)
        kwargs.pop("labels", None)  # PEFT passes on all arguments that it names
        outputs = self.base_model(*args, **kwargs)
        hidden_NH = outputs.last_hidden_state[0].index_select(0, targets - 1)
        head = self.get_output_embeddings()
        weight, bias = head.weight, head.bias
        if isinstance(weight, DTensor):
            weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
        with maybe_gather_lm_head_ctx(weight, bias):
            log_probs_N, *_ = ChunkedLogProbFunction.apply(
                hidden_NH, weight, bias, target_ids, 1.0, VOCABULARY_TILE, softcap, scale, ()
            )
        return {"nll_N": -log_probs_N, "router_logits": getattr(outputs, "router_logits", None)}

    model.forward = types.MethodType(with_targets, model)


def logit_transform(config: Any) -> tuple[float | None, float]:
    """(soft cap, factor) that a model applies to its head's logits, by the names in transformers' configs.

    probe.check_head detects a model that does something else.
    """
    factor = next(
        (
            getattr(config, name)
            for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if getattr(config, name, None) is not None
        ),
        None,
    )
    if factor is None and getattr(config, "logits_scaling", None) is not None:
        factor = 1 / config.logits_scaling
    return getattr(config, "final_logit_softcapping", None), 1.0 if factor is None else float(factor)
