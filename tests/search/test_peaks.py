import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from sft_core.search.peaks import fall_of, first_highest, peak_of, unimodal_peak


def naive_fit_error(scores: list[float], turn: int) -> float:
    """Least squares of a rise to `turn` and a fall from it, by projected blocks of every partition."""
    best = math.inf
    for rise_end in (turn, turn + 1):
        best = min(best, best_isotonic(scores[:rise_end]) + best_isotonic(scores[rise_end:][::-1]))
    return best


def best_isotonic(scores: list[float]) -> float:
    """The least error of a rising fit over every way to cut the scores into level blocks."""
    best = 0.0 if not scores else math.inf
    for cuts in range(1 << max(0, len(scores) - 1)):
        blocks, start = [], 0
        for place in range(1, len(scores) + 1):
            if place == len(scores) or cuts >> (place - 1) & 1:
                blocks.append(scores[start:place])
                start = place
        means = [sum(block) / len(block) for block in blocks if block]
        if blocks and blocks[0] and all(one <= other for one, other in itertools.pairwise(means)):
            errors = (sum((score - mean) ** 2 for score in block) for block, mean in zip(blocks, means, strict=True))
            best = min(best, sum(errors))
    return best


@settings(max_examples=60, deadline=None)
@given(scores=st.lists(st.integers(0, 9).map(float), min_size=1, max_size=6))
def test_unimodal_peak_is_the_turn_of_the_best_fit(scores: list[float]):
    found = unimodal_peak(np.array(scores))
    errors = [naive_fit_error(scores, turn) for turn in range(len(scores))]
    assert errors[found] == pytest.approx(min(errors), abs=1e-9)


def test_unimodal_peak_of_a_curve_that_rises_and_falls_is_its_top():
    assert unimodal_peak(np.array([1.0, 2, 5, 4, 3])) == 2
    assert unimodal_peak(np.array([1.0, 2, 3])) == 2
    assert unimodal_peak(np.array([3.0, 2, 1])) == 0
    assert unimodal_peak(np.array([2.0, 2, 2])) == 0
    assert unimodal_peak(np.array([1.0, 3, 2, 3, 2])) == 1
    assert unimodal_peak(np.array([0.0, 6.5, 0, 1, 2, 3, 4, 5, 6])) == 8, "one lucky evaluation is no peak"
    assert first_highest(np.array([0.0, 6.5, 0, 1, 2, 3, 4, 5, 6])) == 1


def test_fall_is_tested_row_by_row():
    rng = np.random.default_rng(0)
    level = rng.normal(size=400) * 5  # rows differ far more than they fall
    rows = np.stack([level, level + 0.5, level + 0.5, level + 0.4, level + 0.2, level])
    rows += 0.3 * rng.standard_normal(rows.shape)
    peak = peak_of(rows)
    assert peak.evaluation in (1, 2)
    assert peak.fall.drop == pytest.approx(0.45, abs=0.1)
    assert peak.fall.p < 1e-6
    assert fall_of(np.array([0.1])).p == 1.0
    assert fall_of(np.zeros(5)).p == 1.0
    assert fall_of(np.full(5, 0.1)).p == 0.0


@pytest.mark.parametrize("num_rows", [5, 100])
def test_fall_by_chance_is_as_rare_as_its_level(num_rows: int):
    rng = np.random.default_rng(1)
    falls = sum(fall_of(rng.standard_normal(num_rows)).p < 0.05 for _ in range(4000))
    assert 160 < falls < 240, "the normal distribution in place of Student's finds 350 in five rows"


@settings(max_examples=60, deadline=None)
@given(differences=st.lists(st.integers(-9, 9), min_size=2, max_size=30).filter(lambda rows: len({*rows}) > 1))
def test_fall_has_the_p_of_the_t_test(differences: list[int]):
    rows = np.array(differences) / 7
    assert fall_of(rows).p == pytest.approx(ttest_1samp(rows, 0, alternative="greater").pvalue, rel=1e-9)


def test_nothing_after_the_peak_has_not_fallen():
    assert peak_of(np.array([[0.1] * 3, [0.2] * 3, [0.3] * 3])).fall.p == 1.0
