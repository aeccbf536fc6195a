"""Which packs each optimizer step trains on: a pure function of seed, epoch and step, blind to ranks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from sft_core.data.packing.balance import grouped_order
from sft_core.train.flops import pair_flops

if TYPE_CHECKING:
    pass

EMPTY = -1  # a slot without a pack: the last batch of an epoch is smaller, never filled up with repeats


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
    """Optimizer steps of the whole training."""
    if max_steps is not None:
        return max_steps
    return max(1, round(math.ceil(num_packs / global_batch_size) * num_epochs))


def order_coefficients(model: Any) -> tuple[float, float]:
    """(linear, quadratic): by linear * L + quadratic * L**2 of each document the schedule calls packs alike in cost.

    linear is 6 * all parameters, though the embedding is looked up, experts share the tokens and only trained tokens
    need the head (flops.training_flops counts so). It stays as it is: other coefficients would put the packs of every
    recipe into another order, and a resumed training would go on with packs that it had. An order needs no more, for
    only the ratio of the two matters, and between full packs, equal in tokens, not even that.
    """
    return 6.0 * model.num_parameters(), pair_flops(model.config)


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor that is at most `most`; 1 where that is less.

    >>> largest_divisor(12, 5)
    4
    """
    return next(divisor for divisor in range(max(1, min(most, number)), 0, -1) if number % divisor == 0)
