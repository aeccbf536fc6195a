"""First-fit-decreasing, compiled: a counting sort, then the first pack with room found in O(log n)."""

import numba
import numpy as np


@numba.njit(cache=True)
def pack_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The pack of each sequence: int64, shape (sequences,). lengths: int32, each 1 to capacity; capacity below 2**31.

    Equal sequences are placed in their given order, as after a stable sort. Needs 4 bytes for each token of the
    longest sequence, to count by length.
    """
    longest = total = 0
    for length in lengths:
        longest = max(longest, length)
        total += length
    counts = np.zeros(longest + 1, np.int32)
    for length in lengths:
        counts[length] += 1
    # Of two packs at most half full the later one's first sequence would have gone into the earlier one. So all packs
    # but one are more than half full, total > (packs - 1) * capacity / 2, and packs <= 2 * total // capacity + 1.
    # Each pack holds a sequence, too. A tree of that size, of int32, stays in cache where one of a leaf for each
    # sequence does not.
    most_packs = min(len(lengths), 2 * total // capacity + 1)
    leaves = 1
    while leaves < most_packs:
        leaves *= 2
    free = np.full(2 * leaves, capacity, np.int32)  # free[node]: the most free space of any pack below it
    pack_by_rank = np.empty(len(lengths), np.int32)  # by place in descending order of length
    rank = 0
    for length in range(longest, 0, -1):
        unplaced = counts[length]
        counts[length] = rank  # from here on: the place of the next sequence of this length
        while unplaced > 0:
            node = 1
            while node < leaves:
                node *= 2
                if free[node] < length:
                    node += 1
            # All that fit at once: the next of this length would be led to the same pack as long as it has room.
            fitting = min(unplaced, free[node] // length)
            assert fitting > 0  # else the tree was too small, and this would never end
            pack_by_rank[rank : rank + fitting] = node - leaves
            rank += fitting
            unplaced -= fitting
            free[node] -= fitting * length
            while node > 1:
                most = max(free[node], free[node ^ 1])
                node //= 2
                if free[node] == most:
                    break  # nothing changes further up
                free[node] = most
    pack = np.empty(len(lengths), np.int64)
    for index in range(len(lengths)):
        length = lengths[index]
        pack[index] = pack_by_rank[counts[length]]
        counts[length] += 1
    return pack
