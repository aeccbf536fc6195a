"""Which packs each optimizer step trains on: a pure function of seed, epoch and step, blind to ranks."""

from __future__ import annotations

import math

import numpy as np

EMPTY = -1  # a slot without a pack: the last batch of an epoch is smaller, never filled up with repeats


def step_packs(
    num_packs: int, *, global_batch_size: int, num_epochs: float, max_steps: int | None, seed: int
) -> np.ndarray:
    """Pack numbers by step: int64, shape (steps, global_batch_size), EMPTY where a batch is not full.

    Each epoch is a seeded permutation in which every pack stands once; `max_steps` wins over `num_epochs`.
    """
    steps_per_epoch = math.ceil(num_packs / global_batch_size)
    num_steps = max_steps if max_steps is not None else max(1, round(steps_per_epoch * num_epochs))
    epochs = []
    for epoch in range(math.ceil(num_steps / steps_per_epoch)):
        slots = np.full(steps_per_epoch * global_batch_size, EMPTY, dtype=np.int64)
        slots[:num_packs] = np.random.default_rng([seed, epoch]).permutation(num_packs)
        epochs.append(slots.reshape(steps_per_epoch, global_batch_size))
    return np.concatenate(epochs)[:num_steps]
