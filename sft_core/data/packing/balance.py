"""Balance: a global batch has packs of similar cost, so that no rank waits for a slower one.

Packs are equally long, but attention is quadratic in the length of a document: a pack of one long document costs
more than one of many short ones, and a step takes as long as its slowest rank. The order does not depend on ranks.
"""

from __future__ import annotations

import numpy as np


def pack_costs(num_tokens: np.ndarray, offsets: np.ndarray, *, linear: float, quadratic: float) -> np.ndarray:
    """The cost of each pack: linear * tokens + quadratic * sum of squared document lengths; float64, shape (packs,).

    num_tokens: shape (documents,); pack p holds the documents offsets[p] to offsets[p + 1], at least one.
    """
    lengths = num_tokens.astype(np.int64)  # 46,341 tokens squared are beyond int32, and whole numbers sum exactly
    tokens, squares = (np.add.reduceat(terms, offsets[:-1]) for terms in (lengths, lengths**2))
    return linear * tokens + quadratic * squares


def grouped_order(costs: np.ndarray, group_size: int, rng: np.random.Generator, window: int = 16) -> np.ndarray:
    """A random order of the packs in which the packs of a group cost about the same: int64, shape (packs,).

    A group is `group_size` neighbours. A random permutation is cut into windows of about `window` groups; within a
    window the packs are sorted by cost and cut into groups, and the groups are shuffled. So each pack is there once,
    each window is a random sample of all costs, and there is no curriculum over the epoch. Packs that fill no group
    come last; they are a random choice. With groups of one pack the order is the permutation. A larger window makes
    the packs of a group more alike, and the order less random.
    """
    permutation = rng.permutation(len(costs))
    num_groups = len(costs) // group_size
    if group_size == 1 or num_groups == 0:
        return permutation
    # At least two windows: one over all packs would make the same groups whatever the permutation, at every epoch.
    num_windows = max(min(2, num_groups), round(num_groups / window))
    grouped, rest = np.split(permutation, [num_groups * group_size])
    windows = np.array_split(grouped.reshape(num_groups, group_size), num_windows)
    return np.concatenate([*(_window_order(packs.ravel(), costs, group_size, rng) for packs in windows), rest])


def slowest_over_mean(costs: np.ndarray, num_ranks: int, *, each_micro_step: bool = False) -> float:
    """The time of all steps, relative to the time if each rank had the same work: 1 is even.

    costs: of each slot, shape (steps, group_size), 0 for an empty slot. num_ranks divides group_size; rank r has the
    slots j * num_ranks + r. each_micro_step: ranks wait for each other at every j, as FSDP and ZeRO-3 do.
    """
    of_ranks = costs.reshape(len(costs), -1, num_ranks)
    waits = of_ranks if each_micro_step else of_ranks.sum(axis=1, keepdims=True)
    return float(waits.max(axis=2).sum() / waits.mean(axis=2).sum())


def _window_order(packs: np.ndarray, costs: np.ndarray, group_size: int, rng: np.random.Generator) -> np.ndarray:
    by_cost = packs[np.argsort(costs[packs], kind="stable")].reshape(-1, group_size)
    groups = rng.permutation(by_cost)[:, _up_and_down(group_size)]
    # Rotate each group at random, or the same rank would get the heaviest pack at every step.
    rotated = (np.arange(group_size) + rng.integers(group_size, size=(len(groups), 1))) % group_size
    return np.take_along_axis(groups, rotated, axis=1).ravel()


def _up_and_down(group_size: int) -> np.ndarray:
    """Indices into a sorted group: 0, 2, 4, ... up and ..., 5, 3, 1 down; int64, shape (group_size,).

    The trainer hands out packs in turn: micro-step j of rank r is slot j * ranks + r of the global batch. A rank with
    dear packs on the way up has cheap ones on the way down, so the sums of all ranks are nearly the same, whatever
    number of ranks divides the batch. Neighbours have similar costs all the way round, the last and the first too. So
    a single micro-step is even as well (FSDP and ZeRO-3 wait at each), and the circle may be rotated.
    """
    places = np.arange(group_size)
    return np.concatenate([places[::2], places[1::2][::-1]])
