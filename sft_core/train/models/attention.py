"""Attention that knows the documents of a pack: PyTorch's variable-length flash attention, for transformers' models.

Registered under a name of its own, it makes a model build no mask: a pack of T tokens costs no T x T matrix, and the
bounds of its documents reach the kernel as they are, without a look at position ids that would synchronise the device.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from sft_core.train.models.small import one_thread, small_model

log = logging.getLogger(__name__)
VARLEN = "varlen"
KNOWS_DOCUMENTS = (VARLEN, "flash_attention_2")  # these take the bounds of documents, and need no mask
MAX_HEAD_DIM = 256  # of flash attention's kernels

# H heads, K key heads, T tokens, D head size.


class NotByVarlen(ValueError):
    """The model asks for attention that the kernel does not compute; another implementation does."""


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

    cu_seq_lens_q: int32, shape (documents + 1,): where documents begin, and the end. max_length_q: the longest one.
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
    kwargs: dict[str, Any],
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
    if torch.is_autocast_enabled("cuda"):  # rotary embeddings make fp32 of what autocast made half precision
        dtype = torch.get_autocast_dtype("cuda")
    if dtype not in (torch.bfloat16, torch.float16):
        raise NotByVarlen(f"varlen attention takes half precision, and the model computes in {dtype}")
    groups = query_THD.shape[1] // key_TKD.shape[1]
    takes_groups = "enable_gqa" in _kernel_options()
    if groups > 1 and not takes_groups:
        key_TKD, value_TKD = (states.repeat_interleave(groups, dim=1) for states in (key_TKD, value_TKD))
    options: dict[str, Any] = {"enable_gqa": groups > 1} if takes_groups else {}
    query_THD, key_TKD, value_TKD = (states.to(dtype) for states in (query_THD, key_TKD, value_TKD))
    return varlen_attn(  # type: ignore[return-value]  # the tensor alone, as nothing else is asked for
        query_THD, key_TKD, value_TKD, bounds, bounds, longest, longest, scale=scaling, window_size=window, **options
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
    """The same on a CPU, which has no such kernel: document after document."""
    lengths = bounds.diff().tolist()
    found = []
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
        found.append(out_HTD.transpose(0, 1))
    return torch.cat(found)


def choose_attention(asked: str, config: Any, *, half: bool, trust_remote_code: bool = False) -> str | None:
    """What a model is loaded with; None for transformers' own choice: sdpa where its class has it, else eager.

    asked: the recipe's; for `auto` varlen on a GPU where the model will compute in half precision (half) and its class
    allows it. The kernels take nothing else.
    """
    if asked != "auto":
        return asked
    chosen = VARLEN if torch.cuda.is_available() and half and allows_varlen(config, trust_remote_code) else None
    log.info("attn_implementation=%s by auto", chosen or "sdpa, else eager")
    return chosen


def allows_varlen(config: Any, trust_remote_code: bool = False) -> bool:
    """Whether a small model of the class says the same by varlen attention as by its own; asked once in a process."""
    key = (type(config), json.dumps(config.to_dict(), sort_keys=True, default=str))
    if key not in _ALLOWS:
        with one_thread():
            _ALLOWS[key] = _says_the_same(config, trust_remote_code)
    return _ALLOWS[key]


_ALLOWS: dict[Any, bool] = {}
_TOKENS, _ROUNDING = 200, 1e-4


def _says_the_same(config: Any, trust_remote_code: bool) -> bool:
    own = small_model(config, attention=None, trust_remote_code=trust_remote_code)
    if own is None or not own._supports_flash_attn or not own._can_set_attn_implementation():
        return False  # its authors know of masks or biases that such kernels leave out
    by_varlen = small_model(config, attention=VARLEN, trust_remote_code=trust_remote_code)
    if by_varlen is None:
        return False
    by_varlen.train()  # with dropout, if it has some
    ids = torch.arange(_TOKENS)[None] * 7 % own.config.get_text_config().vocab_size
    bounds = torch.tensor([0, _TOKENS], dtype=torch.int32)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            expected = own(input_ids=ids, use_cache=False).logits
            found = by_varlen(
                input_ids=ids,
                position_ids=torch.arange(_TOKENS)[None],
                use_cache=False,
                cu_seq_lens_q=bounds,
                cu_seq_lens_k=bounds,
                max_length_q=_TOKENS,
                max_length_k=_TOKENS,
            ).logits
    except Exception as error:  # NotByVarlen, or what a class makes of bounds that it cannot use
        log.info("attn_implementation: not varlen (%s)", str(error).splitlines()[0])
        return False
    return bool((found - expected).norm() <= _ROUNDING * expected.norm())


AttentionInterface.register(VARLEN, varlen_attention)
