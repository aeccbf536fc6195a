"""First fit in a given order, compiled: the first pack with room, found in O(log n)."""

import numba
import numpy as np


@numba.njit(cache=True)
def first_fit(lengths: np.ndarray, order: np.ndarray, capacity: int) -> np.ndarray:
    """The pack of each sequence: int64, shape (sequences,). order: the sequences as they are placed."""
    leaves = 1
    while leaves < len(lengths):
        leaves *= 2
    free = np.full(2 * leaves, capacity, np.int64)  # free[node]: the most free space of any pack below it
    pack = np.empty(len(lengths), np.int64)
    for index in order:
        node = 1
        while node < leaves:
            node *= 2
            if free[node] < lengths[index]:
                node += 1
        pack[index] = node - leaves
        free[node] -= lengths[index]
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
    return pack
