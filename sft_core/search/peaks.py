"""The peak of a noisy curve by a unimodal fit, and whether the curve has fallen since by a paired t-test."""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Fall:
    """How far rows fell: the mean, its standard error, and the one-sided p-value against no fall."""

    drop: float
    stderr: float
    p: float


@dataclasses.dataclass(frozen=True)
class Peak:
    """evaluation: the number of the evaluation at which the fitted curve is highest. fall: from it to the end."""

    evaluation: int
    fall: Fall


def first_highest(scores: np.ndarray) -> int:
    """The first evaluation with the highest score."""
    return int(np.argmax(scores))


def unimodal_peak(scores: np.ndarray) -> int:
    """The evaluation at which the best rising-then-falling fit turns; the first of equally good ones.

    Least squares over all turning points (Stout 2008, Unimodal regression via prefix isotonic regression): the error
    of an isotonic fit up to each point plus that of an antitonic fit after it. Quadratic in the number of evaluations,
    which is a dozen.
    """
    rising = [_isotonic_error(scores[: end + 1]) for end in range(len(scores))]
    falling = [_isotonic_error(scores[start:][::-1]) for start in range(len(scores))]
    # The turning point belongs to one side: its own value is fitted once.
    errors = [
        min(
            rising[turn] + (falling[turn + 1] if turn + 1 < len(scores) else 0.0),
            (rising[turn - 1] if turn else 0.0) + falling[turn],
        )
        for turn in range(len(scores))
    ]
    lowest = min(errors)
    candidates = [turn for turn, error in enumerate(errors) if error <= lowest + 1e-12 * max(1.0, lowest)]
    # Between equally good points the fit is level, so take the highest of them.
    return max(candidates, key=lambda turn: (scores[turn], -turn))


def peak_of(rows: np.ndarray) -> Peak:
    """rows: the scores of a task by row, shape (evaluations, rows).

    The test compares each row's mean over the peak and the peak's neighbours with the row's mean over the last quarter
    of the evaluations after them. A curve without evaluations after them has not fallen.
    """
    peak = unimodal_peak(rows.mean(axis=1))
    window = slice(max(0, peak - 1), min(len(rows), peak + 2))
    after = rows[window.stop :]
    if len(after) == 0:
        return Peak(peak, Fall(0.0, math.inf, 1.0))
    tail = after[-math.ceil(len(after) / 4) :]
    return Peak(peak, fall_of(rows[window].mean(axis=0) - tail.mean(axis=0)))


def fall_of(differences: np.ndarray) -> Fall:
    """The paired t-test, one-sided. differences: how far each row fell, shape (rows,).

    It calls Student's distribution directly: scipy.stats.ttest_1samp gives the same p, but takes 3 s to import instead
    of 1, and warns of rows that are all equal.
    """
    from scipy.special import stdtr

    drop = float(differences.mean())
    if len(differences) < 2:
        return Fall(drop, math.inf, 1.0)
    stderr = float(differences.std(ddof=1) / math.sqrt(len(differences)))
    if stderr == 0:
        return Fall(drop, 0.0, 0.0 if drop > 0 else 1.0)
    return Fall(drop, stderr, float(stdtr(len(differences) - 1, -drop / stderr)))


def _isotonic_error(scores: np.ndarray) -> float:
    """The squared error of the best rising fit."""
    from scipy.optimize import isotonic_regression

    return float(((scores - isotonic_regression(scores).x) ** 2).sum())
