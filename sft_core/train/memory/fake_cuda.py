"""Replacements for operations that keep other tensors for the backward pass on CUDA than on a CPU; for fake tensors.

torch's fake tensors can be on a CUDA device only if torch is built for CUDA, so a model's fake pass runs on the CPU.
CPU operations make tensors of the same sizes, except for the types of CUDA's autocast, dropout's mask, and kernels
written for CUDA: attention, TRL's head, Liger's layers. Each replacement here allocates and saves what the CUDA
operation does, in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

# Operations that autocast runs in float32 on CUDA and not on a CPU, and those whose result it makes float32
# (torch 2.13, ATen/autocast_mode.h: AT_FORALL_FP32, AT_FORALL_FP32_SET_OPT_DTYPE); losses and images left out.
FLOAT32_INPUTS = frozenset(
    {
        "__rpow__", "acos", "asin", "cosh", "cosine_similarity", "erfinv", "exp", "expm1", "group_norm", "layer_norm",
        "log", "log10", "log1p", "log2", "logsumexp", "native_layer_norm", "pow", "reciprocal", "rms_norm", "rsqrt",
        "sinh", "softplus", "tan",
    }
)  # fmt: skip
FLOAT32_RESULTS = frozenset(
    {
        "cumprod", "cumsum", "linalg_matrix_norm", "linalg_vector_norm", "log_softmax", "norm", "prod", "softmax",
        "sum",
    }
)  # fmt: skip
# The attention that gets the bounds of documents: transformers makes no mask for a name that it does not know.
DOCUMENTS = "documents_alone"
# Of trl.kernels.chunked_logprob and trl.trainer.utils (1.16): trl takes seconds to import.
TOKEN_CHUNK, VOCABULARY_CHUNK = 4096, 32768
# Models whose norms and MLPs Liger replaces by the layers below (liger-kernel 0.8.5). For other models that Liger
# supports, the count is too high.
LIGER_MODELS = frozenset({"llama", "mistral", "ministral", "granite", "qwen2", "qwen3", "smollm3", "olmo2", "olmo3"})


class OnCuda(TorchFunctionMode):
    """Replaces operations that take other memory on CUDA than on a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            query, key, value, mask = (*args, None)[:4]
            return attend(query, key, value, kwargs.get("attn_mask", mask)).transpose(1, 2)
        if torch.is_autocast_enabled("cpu"):
            if name in FLOAT32_INPUTS:
                args = [value.float() if _is_16_bit(value) else value for value in args]
            elif name in FLOAT32_RESULTS and args and _is_16_bit(args[0]):
                kwargs = {"dtype": torch.float32} | kwargs
        return func(*args, **kwargs)


def _is_16_bit(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.element_size() == 2


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    # A CPU keeps a mask of the input's type, CUDA one of booleans.
    return torch.native_dropout(input, p, training)[0] if p and training else input


def computed_in(tensor: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else tensor.dtype


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Shape (1, tokens, heads, size). query, key, value: (1, heads, tokens, size). mask: (1, 1, tokens, tokens).

    Without a mask as flash attention; with one as torch's memory-efficient attention, which sdpa chooses then.
    """
    dtype = computed_in(query)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), -torch.inf)
    return _Attention.apply(query.to(dtype), key.to(dtype), value.to(dtype), mask)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any) -> torch.Tensor:
        out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        log_sum_exp = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, out, log_sum_exp)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value, _, out, log_sum_exp = ctx.saved_tensors
        held = [torch.empty_like(log_sum_exp), torch.empty_like(query, dtype=torch.float32)]  # summed in float32
        if key.shape[1] != query.shape[1]:  # of each query head, before those that share a key are added up
            held += [torch.empty_like(out), torch.empty_like(out)]
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _documents_alone(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **_: Any
) -> tuple[torch.Tensor, None]:
    return attend(query, key, value), None


AttentionInterface.register(DOCUMENTS, _documents_alone)


class FusedHead(torch.autograd.Function):
    """Log-probabilities (tokens,) of hidden states (tokens, width), as TRL's ChunkedLogProbFunction on Triton."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, bias: Any) -> torch.Tensor:
        ctx.dtype = computed_in(hidden)
        sums = [hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(7)]  # maxima, exponentials, targets
        _hold_tiles(hidden, weight, ctx.dtype)
        log_probs, log_sum_exp, targets = sums[0], sums[1], hidden.new_empty(len(hidden), dtype=torch.int64)
        ctx.save_for_backward(hidden, weight, bias, targets, log_sum_exp)
        return log_probs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        tensors = ctx.saved_tensors[:3]
        gradients = [
            torch.zeros_like(tensor, dtype=torch.float32) if tensor is not None and is_needed else None
            for tensor, is_needed in zip(tensors, ctx.needs_input_grad, strict=True)
        ]
        _hold_tiles(tensors[0], tensors[1], ctx.dtype)
        return tuple(
            None if gradient is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(gradients, tensors, strict=True)
        )


def _hold_tiles(hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> None:
    """Allocates one tile of tokens, one of the vocabulary and their logits: the kernel holds one of each at a time."""
    logits = hidden.new_empty(min(len(hidden), TOKEN_CHUNK), VOCABULARY_CHUNK, dtype=dtype)
    tiles = (hidden[:TOKEN_CHUNK].to(dtype), weight[:VOCABULARY_CHUNK].to(dtype))
    del logits, tiles


def patch_liger(model: Any) -> None:
    """Replaces a fake model's norms and MLPs where Liger replaces the real model's."""
    if model.config.get_text_config().model_type not in LIGER_MODELS:
        return
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda hidden, module=module: _LigerNorm.apply(hidden, module.weight)
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")):
            module.forward = lambda hidden, module=module: module.down_proj(
                _LigerGlu.apply(module.gate_proj(hidden), module.up_proj(hidden))
            )


class _LigerNorm(torch.autograd.Function):
    """LigerRMSNormFunction: keeps its input and a number a row; writes its gradient over the incoming one."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, hidden.new_empty(hidden.shape[:-1], dtype=torch.float32))
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].contiguous(), torch.empty_like(ctx.saved_tensors[1])


class _LigerGlu(torch.autograd.Function):
    """LigerSiLUMulFunction: keeps gate and up, and writes their gradients over them."""

    @staticmethod
    def forward(ctx: Any, gate: Any, up: Any) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.saved_tensors
