"""Which packs each optimizer step trains on: a pure function of seed, epoch and step, blind to ranks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sft_core.data.balance import grouped_order

# Layers whose attention sees the whole document, by the names of transformers' configs.
FULL_ATTENTION = ("full_attention", "hybrid")
EMPTY = -1  # a slot without a pack: the last batch of an epoch is smaller, never filled up with repeats


def step_packs(
    costs: np.ndarray, *, global_batch_size: int, num_epochs: float, max_steps: int | None, seed: int
) -> np.ndarray:
    """Pack numbers by step: int64, shape (steps, global_batch_size), EMPTY where a batch is not full.

    costs: shape (packs,), what training on each pack takes. Each epoch is a seeded order in which every pack stands
    once and a batch holds packs of like cost; `max_steps` wins over `num_epochs`.

    Slot j * ranks + r is what rank r gets at micro-step j: with one pack a micro-batch, accelerate's
    BatchSamplerShard._iter_with_no_split (1.15; split_batches is off) gives batch i to rank i % ranks, and the
    Trainer's get_batch_samples (transformers 5.23) takes the next global_batch_size / ranks of them for each step.
    """
    num_packs = len(costs)
    steps_per_epoch = math.ceil(num_packs / global_batch_size)
    num_steps = num_steps_of(num_packs, global_batch_size, num_epochs, max_steps)
    epochs = []
    for epoch in range(math.ceil(num_steps / steps_per_epoch)):
        slots = np.full(steps_per_epoch * global_batch_size, EMPTY, dtype=np.int64)
        slots[:num_packs] = grouped_order(costs, global_batch_size, np.random.default_rng([seed, epoch]))
        epochs.append(slots.reshape(steps_per_epoch, global_batch_size))
    return np.concatenate(epochs)[:num_steps]


def num_steps_of(num_packs: int, global_batch_size: int, num_epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of the whole training."""
    if max_steps is not None:
        return max_steps
    return max(1, round(math.ceil(num_packs / global_batch_size) * num_epochs))


def training_flops(model: Any) -> tuple[float, float]:
    """What a document of L tokens takes, forward and backward: linear * L + quadratic * L**2. model: of transformers.

    linear = 6 * parameters, quadratic = 6 * layers * attention width. PaLM (arXiv 2204.02311, appendix B) counts
    6N + 12 * layers * heads * head size * T a token at sequence length T, as nanoGPT does, over the whole T x T square;
    half of the 12 is here, for causal attention needs only the triangle, and kernels that skip the rest do only that.

    Layers are those that see the whole document: sliding windows and recurrent layers are linear, and their small
    attention terms are left out, as is all attention of a model whose config names no heads (Mamba). Only the ratio
    of the two matters, and between full packs, equal in tokens, not even that: so an estimate does.
    """
    config = model.config.get_text_config()
    num_heads, hidden_size, layers = (
        getattr(config, name, None) for name in ("num_attention_heads", "hidden_size", "num_hidden_layers")
    )
    linear = 6.0 * model.num_parameters()
    if not (isinstance(num_heads, int) and isinstance(hidden_size, int) and isinstance(layers, int) and num_heads):
        return linear, 0.0
    kinds = getattr(config, "layer_types", None)
    num_full = layers if kinds is None else sum(kind in FULL_ATTENTION for kind in kinds)
    width = num_heads * (getattr(config, "head_dim", None) or hidden_size // num_heads)
    return linear, 6.0 * num_full * width
