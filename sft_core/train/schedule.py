"""The packs of each optimizer step: a pure function of seed, epoch and step, independent of the ranks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sft_core.data.packing.balance import grouped_order
from sft_core.train.flops import pair_flops

EMPTY = -1  # a slot without a pack: an epoch's last batch may be smaller, and repeats no packs


def step_packs(
    costs: np.ndarray, *, global_batch_size: int, num_epochs: float, max_steps: int | None, seed: int
) -> np.ndarray:
    """Pack numbers by step: int64, shape (steps, global_batch_size), EMPTY where a batch is not full.

    costs: shape (packs,), what training on each pack takes. Each epoch is a seeded order in which every pack stands
    once and a batch holds packs of like cost; `max_steps` wins over `num_epochs`.

    Slot j * ranks + r is what rank r gets at micro-step j, where ranks counts those that get packs of their own
    (Runtime.num_data_ranks): with one pack a micro-batch, accelerate's BatchSamplerShard._iter_with_no_split (1.15;
    split_batches is off) gives batch i to rank i % ranks, and the Trainer's get_batch_samples (transformers 5.23) takes
    the next global_batch_size / ranks of them for each step.
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
    """Optimizer steps of the whole training; a broken epoch is rounded up, as the Trainer does it."""
    if max_steps is not None:
        return max_steps
    return math.ceil(math.ceil(num_packs / global_batch_size) * num_epochs)


def order_coefficients(model: Any) -> tuple[float, float]:
    """(linear, quadratic): a document of L tokens costs linear * L + quadratic * L**2 for the order of packs.

    linear is 6 * all parameters. flops.training_flops counts more exactly: the embedding is looked up, experts share
    the tokens, only trained tokens need the head. Do not change the coefficients: that reorders the packs of every
    recipe, and a resumed training would repeat packs. They suffice for an order: only their ratio matters, and for full
    packs, which have equally many tokens, not even that.
    """
    return 6.0 * model.num_parameters(), pair_flops(model.config)


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is at most `most`; 1 if `most` is below 1.

    >>> largest_divisor(12, 5)
    4
    """
    return next(divisor for divisor in range(max(1, min(most, number)), 0, -1) if number % divisor == 0)
