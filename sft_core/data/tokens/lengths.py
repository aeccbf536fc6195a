"""Histograms of lengths, small enough for a manifest: four bins an octave, so that 50 and 50,000 tokens both show.

>>> by_length(np.array([0, 3, 39, 40, 47, 48]))
{'0': 1, '3': 1, '32': 1, '40': 2, '48': 1}
"""

from __future__ import annotations

import numpy as np

_SHIFT = 3  # the bits of a length that its bin keeps: the leading one, and two that cut the octave in four


def by_length(lengths: np.ndarray) -> dict[str, int]:
    """The number of lengths in each bin, by the bin's lower bound as text, as JSON's names are. lengths: at least 0."""
    num_bits = np.frexp(lengths.astype(np.float64))[1]
    shift = np.maximum(num_bits - _SHIFT, 0)
    # Bins by number: first bins of a single length, then four an octave.
    counts = np.bincount(4 * shift + (lengths >> shift))
    return {str(_lower(number)): int(counts[number]) for number in np.flatnonzero(counts).tolist()}


def _lower(number: int) -> int:
    shift = max(number // 4 - 1, 0)
    return number - 4 * shift << shift


def end_of(lower: int) -> int:
    """The bin's upper bound (exclusive)."""
    return lower + (1 << max(lower.bit_length() - _SHIFT, 0))
