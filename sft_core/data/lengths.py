"""Histograms of lengths, small enough for a manifest: four bins an octave, so that 50 tokens and 50,000 both show.

>>> by_length(np.array([0, 3, 39, 40, 47, 48]))
{'0': 1, '3': 1, '32': 1, '40': 2, '48': 1}
"""

from __future__ import annotations

import numpy as np

_SHIFT = 3  # the bits of a length that its bin keeps: the leading one, and two that cut the octave in four


def by_length(lengths: np.ndarray) -> dict[str, int]:
    """How many lengths are in each bin, by the bin's lower bound: text, as JSON's names are. lengths: at least 0."""
    num_bits = np.frexp(lengths.astype(np.float64))[1].astype(np.int64)
    shift = np.maximum(num_bits - _SHIFT, 0)
    lower, counts = np.unique(lengths.astype(np.int64) >> shift << shift, return_counts=True)
    return {str(bound): count for bound, count in zip(lower.tolist(), counts.tolist(), strict=True)}


def end_of(lower: int) -> int:
    """The bin's upper bound, which is in the next one."""
    return lower + (1 << max(lower.bit_length() - _SHIFT, 0))
