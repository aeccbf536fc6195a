"""A small random model of a config's class, with few and narrow layers: tests of the class on it take little time."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.integrations import is_deepspeed_zero3_enabled

MOST_PARAMETERS = 3e8  # of the largest model that is built: 1.2 GB
FEWEST_LAYERS, LAYERS = 2, 4  # more if the first layers do not include every kind of layer
# The names of sizes in transformers' configs, and the small values. A name that a config lacks is skipped; a name that
# is missing here makes the model larger than necessary.
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim")
_ENOUGH = {
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "vocab_size": 512},
    # Small enough to take effect in a short document.
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "chunk_size", "mamba_chunk_size"), 32),
}
_KEPT_HEADS = 4
_SHORT_HEAD = 8  # the size of heads whose number is tried


def small_model(config: Any, *, attention: str | None, trust_remote_code: bool) -> Any | None:
    """A small model in fp32 on the CPU, in evaluation mode; None if the class cannot be built small.

    attention: transformers' attn_implementation; None: transformers chooses. The head size is the config's. Weights
    depend on the config alone, and are large enough that each layer affects the logits.
    """
    assert not is_deepspeed_zero3_enabled(), "each rank would hold a share of it"
    for narrow in (True, False):
        try:
            reduced = _reduced(config, narrow=narrow)
            with torch.device("meta"):
                shape = AutoModelForCausalLM.from_config(copy.deepcopy(reduced), trust_remote_code=trust_remote_code)
            if sum(parameter.numel() for parameter in shape.parameters()) > MOST_PARAMETERS:
                continue
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                options = {} if attention is None else {"attn_implementation": attention}
                model = AutoModelForCausalLM.from_config(
                    reduced, dtype=torch.float32, trust_remote_code=trust_remote_code, **options
                )
                for parameter in model.parameters():
                    if parameter.ndim == 2:
                        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            return model.eval().requires_grad_(False)
        except Exception:  # a class may raise any error for sizes that it does not support
            continue
    return None


def computes_with_heads(config: Any, heads: int, key_heads: int, rest: int, *, trust_remote_code: bool) -> bool:
    """Whether a small model of the config's class with so many heads computes logits.

    rest: what the hidden size has over a multiple of `heads`.
    """
    try:
        reduced = _reduced(config, narrow=False)
        text = reduced.get_text_config()
        hidden, num_heads = dict.fromkeys(_HIDDEN, heads * _SHORT_HEAD + rest), dict.fromkeys(_HEADS, heads)
        for name, size in {**hidden, **num_heads, "num_key_value_heads": key_heads, "head_dim": _SHORT_HEAD}.items():
            if size_of(text, name):
                setattr(text, name, size)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model = AutoModelForCausalLM.from_config(reduced, dtype=torch.float32, trust_remote_code=trust_remote_code)
            model.eval()(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
    except Exception:  # a class may raise any error
        return False
    return True


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch on one thread: products this small are slower on several, much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _reduced(config: Any, *, narrow: bool) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    _cut_layers(text)
    if narrow:
        heads, hidden = (max(size_of(text, name) for name in names) for names in (_HEADS, _HIDDEN))
        key_heads = size_of(text, "num_key_value_heads")
        if heads and hidden:
            _lower(text, dict.fromkeys(_HIDDEN, _KEPT_HEADS * (hidden // heads)) | dict.fromkeys(_HEADS, _KEPT_HEADS))
        if key_heads:
            _lower(text, {"num_key_value_heads": _KEPT_HEADS if key_heads == heads else min(key_heads, 2)})
    _lower(text, _ENOUGH)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(text, name, None) is not None:
            setattr(text, name, 0)
    return config


def _cut_layers(text: Any) -> None:
    """Keeps the first layers, and cuts each list with an entry per layer to them."""
    num_layers = size_of(text, "num_hidden_layers")
    if not num_layers:
        return
    kinds = getattr(text, "layer_types", None) or []
    showing = next((n for n in range(1, len(kinds) + 1) if {*kinds[:n]} == {*kinds}), LAYERS)
    kept = min(num_layers, max(FEWEST_LAYERS, showing))
    for name, value in [*vars(text).items()]:
        if isinstance(value, list | tuple) and len(value) == num_layers and name != "architectures":
            setattr(text, name, type(value)(value[:kept]))
    text.num_hidden_layers = kept


def _lower(text: Any, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if size_of(text, name) > size:
            setattr(text, name, size)


def size_of(text: Any, name: str) -> int:
    """A size by its name; 0 if the config lacks it."""
    value = getattr(text, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
