"""Attention that knows the documents of a pack: PyTorch's variable-length flash attention, for transformers' models.

transformers builds no mask for an attention name that it does not know, so a pack of T tokens costs no T x T matrix.
The kernel gets the bounds of the documents directly: computing them from position ids would make the host wait for
the device.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from sft_core.train.models.small import one_thread, small_model

log = logging.getLogger(__name__)
VARLEN = "varlen"
KNOWS_DOCUMENTS = (VARLEN, "flash_attention_2")  # these take the bounds of documents instead of a mask
MAX_HEAD_DIM = 256  # of flash attention's kernels

# H heads, K key heads, T tokens, D head size.


class NotByVarlen(ValueError):
    """The model needs attention that this kernel does not compute; choose another attn_implementation."""


def varlen_attention(
    module: torch.nn.Module,
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document: shape (1, T, H, D), as transformers' interface has it.

    cu_seq_lens_q: int32, shape (documents + 1,): where documents begin, and the end. max_length_q: the longest length.
    Raises NotByVarlen for a cache, a mask, dropout, sinks, soft-capping, a bias, and heads over 256.
    """
    _check(module, query_1HTD, key_1KTD, value_1KTD, attention_mask, dropout, is_causal, kwargs)
    if cu_seq_lens_q is None or max_length_q is None or len(query_1HTD) != 1:
        raise NotByVarlen("varlen attention takes one sequence and the bounds of its documents (cu_seq_lens_q)")
    window = (sliding_window - 1 if sliding_window else -1, 0)
    attend = _by_kernel if query_1HTD.is_cuda else _by_document
    query_THD, key_TKD, value_TKD = (states[0].transpose(0, 1) for states in (query_1HTD, key_1KTD, value_1KTD))
    return attend(query_THD, key_TKD, value_TKD, cu_seq_lens_q, max_length_q, scaling, window)[None], None


def _check(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool | None,
    kwargs: Mapping[str, object],
) -> None:
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    faults = {
        "a mask": attention_mask is not None,
        "a cache": query.shape[2] != key.shape[2],
        "dropout": dropout > 0,
        "attention that sees later tokens": not causal,
        f"heads of {query.shape[-1]}": query.shape[-1] > MAX_HEAD_DIM,
        "values of another size than keys": value.shape[-1] != key.shape[-1],
        **{name: kwargs.get(name) is not None for name in ("s_aux", "softcap", "position_bias")},
    }
    if asked := [name for name, is_asked in faults.items() if is_asked]:
        raise NotByVarlen(f"varlen attention does not compute {', '.join(asked)}")


def _by_kernel(
    query_THD: torch.Tensor,
    key_TKD: torch.Tensor,
    value_TKD: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: tuple[int, int],
) -> torch.Tensor:
    dtype = query_THD.dtype
    if torch.is_autocast_enabled("cuda"):  # rotary embeddings turn autocast's half precision back into fp32
        dtype = torch.get_autocast_dtype("cuda")
    if dtype not in (torch.bfloat16, torch.float16):
        raise NotByVarlen(f"varlen attention takes half precision, and the model computes in {dtype}")
    groups = query_THD.shape[1] // key_TKD.shape[1]
    takes_groups = "enable_gqa" in _kernel_options()
    if groups > 1 and not takes_groups:
        key_TKD, value_TKD = (states.repeat_interleave(groups, dim=1) for states in (key_TKD, value_TKD))
    attend = functools.partial(varlen_attn, enable_gqa=groups > 1) if takes_groups else varlen_attn
    query_THD, key_TKD, value_TKD = (states.to(dtype) for states in (query_THD, key_TKD, value_TKD))
    return attend(  # type: ignore[return-value]  # the tensor alone: no other output is requested
        query_THD, key_TKD, value_TKD, bounds, bounds, longest, longest, scale=scaling, window_size=window
    )


@functools.cache
def _kernel_options() -> frozenset[str]:
    return frozenset(inspect.signature(varlen_attn).parameters)


def _by_document(
    query_THD: torch.Tensor,
    key_TKD: torch.Tensor,
    value_TKD: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: tuple[int, int],
) -> torch.Tensor:
    """The same on a CPU, which has no such kernel: one document after another."""
    lengths = bounds.diff().tolist()
    outputs = []
    for query, key, value in zip(*(states.split(lengths) for states in (query_THD, key_TKD, value_TKD)), strict=True):
        mask = None
        if 0 <= window[0] < len(query) - 1:
            behind = torch.arange(len(query))[:, None] - torch.arange(len(query))[None]
            mask = (behind >= 0) & (behind <= window[0])
        out_HTD = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )[0]
        outputs.append(out_HTD.transpose(0, 1))
    return torch.cat(outputs)


def choose_attention(asked: str, config: Any, *, half: bool, trust_remote_code: bool = False) -> str | None:
    """The attn_implementation to load a model with; None: transformers chooses (sdpa if the class has it, else eager).

    asked: model.attn_implementation of the recipe. `auto` chooses varlen on a GPU if the model computes in half
    precision (half), which the kernels require, and its class allows varlen.
    """
    if asked != "auto":
        return asked
    chosen = VARLEN if torch.cuda.is_available() and half and allows_varlen(config, trust_remote_code) else None
    log.info("attn_implementation=%s by auto", chosen or "sdpa, else eager")
    return chosen


def allows_varlen(config: Any, trust_remote_code: bool = False) -> bool:
    """Whether a small model of the class computes the same logits with varlen as with its default attention.

    A process tries each config once.
    """
    key = (type(config), json.dumps(config.to_dict(), sort_keys=True, default=str))
    if key not in _ALLOWS:
        with one_thread():
            _ALLOWS[key] = _computes_the_same(config, trust_remote_code)
    return _ALLOWS[key]


_ALLOWS: dict[Any, bool] = {}
_TOKENS, _ROUNDING = 200, 1e-4


def _computes_the_same(config: Any, trust_remote_code: bool) -> bool:
    by_default = small_model(config, attention=None, trust_remote_code=trust_remote_code)
    if by_default is None or not by_default._supports_flash_attn or not by_default._can_set_attn_implementation():
        return False  # its authors exclude flash kernels: the model uses masks or biases that those leave out
    by_varlen = small_model(config, attention=VARLEN, trust_remote_code=trust_remote_code)
    if by_varlen is None:
        return False
    by_varlen.train()  # with dropout, if it has some
    ids = torch.arange(_TOKENS)[None] * 7 % by_default.config.get_text_config().vocab_size
    bounds = torch.tensor([0, _TOKENS], dtype=torch.int32)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            expected = by_default(input_ids=ids, use_cache=False).logits
            computed = by_varlen(
                input_ids=ids,
                position_ids=torch.arange(_TOKENS)[None],
                use_cache=False,
                cu_seq_lens_q=bounds,
                cu_seq_lens_k=bounds,
                max_length_q=_TOKENS,
                max_length_k=_TOKENS,
            ).logits
    except Exception as error:  # NotByVarlen, or the class's own error over bounds that it does not take
        log.info("attn_implementation: not varlen (%s)", str(error).splitlines()[0])
        return False
    return bool((computed - expected).norm() <= _ROUNDING * expected.norm())


AttentionInterface.register(VARLEN, varlen_attention)
