"""Histograms of lengths: every length is in the bin that holds it, and the bins lie side by side."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sft_core.data.tokens.lengths import by_length, end_of


@given(lengths=st.lists(st.integers(0, 2**31 - 1), max_size=50))
def test_histogram_of_any_lengths_holds_each_in_one_bin(lengths: list[int]) -> None:
    counts = by_length(np.array(lengths, dtype=np.int32))
    bins = [(int(lower), end_of(int(lower))) for lower in counts]
    assert all(start < end for start, end in bins)
    assert counts == {str(start): sum(start <= length < end for length in lengths) for start, end in bins}
    assert sum(counts.values()) == len(lengths)


def test_bins_are_four_an_octave_and_leave_no_gap() -> None:
    bounds = [0]
    while bounds[-1] < 65_536:
        bounds.append(end_of(bounds[-1]))
    assert bounds[:13] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16]
    assert [bound for bound in bounds if 1024 <= bound <= 2048] == [1024, 1280, 1536, 1792, 2048]
    assert list(by_length(np.array(bounds))) == [str(bound) for bound in bounds]
