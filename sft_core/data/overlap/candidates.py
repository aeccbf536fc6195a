"""Candidates for near duplicates: rows with similar MinHash signatures. Compiled.

Method: bands of a signature as buckets (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numba
import numpy as np

RECALL = 0.99  # of the pairs that are exactly as similar as the threshold; of more similar ones more
MAX_COMPARED = 1000  # rows of one bucket that a row is compared with: bounds the work where all rows look alike
NUM_BEST = 8  # candidates kept for a row


def rows_a_band(threshold: float, num_permutations: int) -> int:
    """Permutations in a band: as many as still bring RECALL of the pairs at the threshold into one bucket.

    >>> rows_a_band(0.8, 128)
    6
    """

    def recall(rows: int) -> float:
        return 1 - (1 - threshold**rows) ** (num_permutations // rows)

    return max((rows for rows in range(1, num_permutations + 1) if recall(rows) >= RECALL), default=1)


class Candidates(NamedTuple):
    """For each row, earlier rows that may be as similar as the threshold, the most similar by signature first."""

    of: np.ndarray  # int32, shape (rows, NUM_BEST); -1 where there are fewer
    estimate: np.ndarray  # float32, shape (rows, NUM_BEST)
    num_cut: int  # rows that were not compared with all of most of their buckets


class Signatures:
    """The signatures of many rows, in mapped files that are not copied."""

    def __init__(self, parts: list[np.ndarray], part: np.ndarray, place: np.ndarray):
        """parts: uint32, shape (rows of the part, permutations); part, place: where each row is, shape (rows,)."""
        self._parts = numba.typed.List(np.asarray(array) for array in parts)
        self._part, self._place = part.astype(np.int32), place.astype(np.int32)
        self.num_permutations = parts[0].shape[1]

    def estimate(self, a: int, b: int) -> float:
        """The share of permutations in which two rows agree: their sets' Jaccard similarity, estimated."""
        rows = [self._parts[self._part[row]][self._place[row]] for row in (a, b)]
        return float(np.mean(rows[0] == rows[1]))

    def candidates(self, threshold: float, max_compared: int = MAX_COMPARED) -> Candidates:
        """For each row the earlier ones of its buckets that by estimate may reach the threshold.

        Memory: 8 bytes a band and row (21 bands for 0.8 of 128), and 70 bytes a row.
        """
        rows = rows_a_band(threshold, self.num_permutations)
        num_bands = self.num_permutations // rows
        order = np.empty((num_bands, len(self._part)), np.int32)
        begin = np.empty_like(order)
        for band in range(num_bands):
            _fill_buckets(self._band_keys(slice(band * rows, (band + 1) * rows)), order[band], begin[band])
        # Three standard errors below the threshold: 999 of 1,000 pairs that reach it are verified.
        margin = 3 * math.sqrt(threshold * (1 - threshold) / self.num_permutations)
        floor = math.ceil((threshold - margin) * self.num_permutations)
        of, equal, num_cut = _candidates(
            self._parts, self._part, self._place, order, begin, max(1, floor), max_compared
        )
        return Candidates(of, (equal / self.num_permutations).astype(np.float32), int(num_cut))

    def _band_keys(self, columns: slice) -> np.ndarray:
        keys = np.zeros(len(self._part), np.uint64)
        for number in np.unique(self._part):
            rows = np.flatnonzero(self._part == number)
            for column in self._parts[number][self._place[rows], columns].T:
                keys[rows] = keys[rows] * np.uint64(0x9E3779B97F4A7C15) + column
        return keys


def _fill_buckets(keys: np.ndarray, order: np.ndarray, begin: np.ndarray) -> None:
    """order: the rows, those of one bucket together, each bucket in row order. begin: where in it a row's bucket
    begins; -1 for a row alone in its bucket."""
    order[:] = np.argsort(keys, kind="stable")
    ordered = keys[order]
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    sizes = np.diff(np.append(first, len(keys)))
    begin[order] = np.repeat(np.where(sizes > 1, first, -1), sizes)


@numba.njit(cache=True)
def _candidates(
    parts: numba.typed.List,
    part: np.ndarray,
    place: np.ndarray,
    order: np.ndarray,
    begin: np.ndarray,
    floor: int,
    max_compared: int,
) -> tuple[np.ndarray, np.ndarray, int]:
    num_rows = len(part)
    best = np.full((num_rows, NUM_BEST), -1, np.int32)
    best_equal = np.zeros((num_rows, NUM_BEST), np.int32)
    compared_with = np.full(num_rows, -1, np.int32)  # the last row that was compared with each row
    num_cut = 0
    for row in range(num_rows):
        signature = parts[part[row]][place[row]]
        times_cut = 0
        for band in range(len(order)):
            at, last = begin[band, row], begin[band, row] + max_compared
            while at >= 0 and order[band, at] < row:
                if at == last:
                    times_cut += 1
                    break
                other = order[band, at]
                at += 1
                if compared_with[other] == row:
                    continue
                compared_with[other] = row
                equal = np.sum(signature == parts[part[other]][place[other]])
                slot = NUM_BEST
                # Keep the candidates in order of similarity, and equally similar ones in row order.
                while slot > 0 and (
                    equal > best_equal[row, slot - 1]
                    or (equal == best_equal[row, slot - 1] and other < best[row, slot - 1])
                ):
                    slot -= 1
                if equal >= floor and slot < NUM_BEST:
                    best[row, slot + 1 :] = best[row, slot : NUM_BEST - 1].copy()
                    best_equal[row, slot + 1 :] = best_equal[row, slot : NUM_BEST - 1].copy()
                    best[row, slot], best_equal[row, slot] = other, equal
        num_cut += times_cut > len(order) // 2  # from there on a pair at the threshold may well be missed
    return best, best_equal, num_cut
