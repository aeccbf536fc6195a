"""The models and lengths that are measured: those of a GPU, and tiny ones on a CPU, where the script is only tried."""

from __future__ import annotations

from typing import Any

SHRINK = 32  # times fewer tokens on a CPU
_LLAMA = {"model_type": "llama", "tie_word_embeddings": True, "max_position_embeddings": 65536}
SMOLLM3 = {  # HuggingFaceTB/SmolLM3-3B
    "model_type": "smollm3",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "no_rope_layer_interval": 4,
    "tie_word_embeddings": True,
    "max_position_embeddings": 65536,
}


def _llama(hidden: int, intermediate: int, layers: int, heads: int, key_heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    return {**_LLAMA, **sizes, "num_attention_heads": heads, "num_key_value_heads": key_heads, "vocab_size": 49152}


MODELS: dict[str, dict[str, Any]] = {
    "3b": SMOLLM3,
    "1700m": _llama(2048, 8192, 24, 32, 32),  # SmolLM2's
    "360m": _llama(960, 2560, 32, 15, 5),
    "135m": _llama(576, 1536, 30, 9, 3),
    "30m": _llama(512, 1536, 6, 8, 4) | {"vocab_size": 8192},
}
_TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def config_of(name: str, device: str) -> dict[str, Any]:
    """The model's config; of the tiny one that stands for it on a CPU."""
    return MODELS[name] if device == "cuda" else MODELS[name] | _TINY


def tokens(number: int, device: str) -> int:
    return number if device == "cuda" else max(16, number // SHRINK)


def documents(total: int, each: int) -> list[int]:
    """Lengths of about `each` that are `total` together, as equal as can be.

    >>> documents(65536, 5000)[:2]
    [5042, 5042]
    """
    number = max(1, round(total / each))
    return [total // number + (place < total % number) for place in range(number)]


def two_unequal(total: int) -> list[int]:
    """Documents of 5/8 and 3/8: of about 5 k and 3 k in 8,192."""
    return [total * 5 // 8, total - total * 5 // 8]
