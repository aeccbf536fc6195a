"""Where a noisy curve is highest, and whether it has come down since: by a unimodal fit and a paired test."""

from __future__ import annotations

import dataclasses
import math
from statistics import NormalDist

import numpy as np


@dataclasses.dataclass(frozen=True)
class Fall:
    """By how much rows have fallen in the mean, its standard error, and p: of a mean like that by chance, one-sided."""

    drop: float
    stderr: float
    p: float


@dataclasses.dataclass(frozen=True)
class Peak:
    """evaluation: where the fitted curve is highest. fall: from there to its end."""

    evaluation: int
    fall: Fall


def first_highest(scores: np.ndarray) -> int:
    """The first evaluation with the highest score."""
    return int(np.argmax(scores))


def unimodal_peak(scores: np.ndarray) -> int:
    """The evaluation at which the best rising-then-falling fit turns; of equals the first.

    Least squares over all turning points (Stout 2008, Unimodal regression via prefix isotonic regression): the error
    of an isotonic fit up to and of an antitonic fit from each point. Quadratic in the number of evaluations, a dozen.
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
    # Points between which the fit is level are equally good: the highest of them is the peak.
    return max(candidates, key=lambda turn: (scores[turn], -turn))


def peak_of(rows: np.ndarray) -> Peak:
    """rows: the scores of a task by row, shape (evaluations, rows).

    Each row is compared with itself: its mean over the peak and its neighbours with its mean over the last quarter of
    what follows them. Without anything after that window nothing has fallen.
    """
    peak = unimodal_peak(rows.mean(axis=1))
    window = slice(max(0, peak - 1), min(len(rows), peak + 2))
    after = rows[window.stop :]
    if len(after) == 0:
        return Peak(peak, Fall(0.0, math.inf, 1.0))
    tail = after[-math.ceil(len(after) / 4) :]
    return Peak(peak, fall_of(rows[window].mean(axis=0) - tail.mean(axis=0)))


def fall_of(fallen: np.ndarray) -> Fall:
    """Of rows that fell by so much each, shape (rows,): the paired t-test, one-sided, by its normal approximation."""
    drop = float(fallen.mean())
    if len(fallen) < 2:
        return Fall(drop, math.inf, 1.0)
    stderr = float(fallen.std(ddof=1) / math.sqrt(len(fallen)))
    if stderr == 0:
        return Fall(drop, 0.0, 0.0 if drop > 0 else 1.0)
    return Fall(drop, stderr, 1 - NormalDist().cdf(drop / stderr))


def _isotonic_error(scores: np.ndarray) -> float:
    """The squared error of the best rising fit, by pooling neighbours that violate it (Ayer et al. 1955)."""
    means: list[float] = []
    sizes: list[int] = []
    for score in scores.tolist():
        mean, size = score, 1
        while means and means[-1] > mean:
            mean, size = (means[-1] * sizes[-1] + mean * size) / (sizes[-1] + size), sizes[-1] + size
            means.pop()
            sizes.pop()
        means.append(mean)
        sizes.append(size)
    fitted = np.repeat(means, sizes)
    return float(((scores - fitted) ** 2).sum())
