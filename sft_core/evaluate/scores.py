"""Scores with their counts and standard errors."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from sft_core.report import rows

MAX_EXPONENT = 700.0
# Some templates open the block in the prompt: then the output begins inside it.
_THINKING = re.compile(r"\A((?!<think>).)*?</think>|<think>.*?(</think>|\Z)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Score:
    """A mean over n rows with its standard error, which a single row does not have."""

    metric: str
    value: float
    stderr: float | None
    n: int

    def to_json(self) -> rows.Score:
        """Raises ValueError for a score that is not finite: JSON has no such number, and no reader could compare it."""
        if not (math.isfinite(self.value) and math.isfinite(self.stderr or 0.0)):
            raise ValueError(f"{self.metric}: the score is {self.value} ± {self.stderr}; a score is a finite number")
        return rows.Score(metric=self.metric, value=self.value, stderr=self.stderr, n=self.n)


def strip_thinking(text: str) -> str:
    """A generated answer without its <think> block; empty where the block never ends."""
    return _THINKING.sub("", text).strip()


def token_loss(nll_sums: np.ndarray, num_trained: np.ndarray) -> Score:
    """Loss a trained token over rows. nll_sums, num_trained: shape (rows,)."""
    return ratio_score("loss", nll_sums, num_trained)


def token_accuracy(num_correct: np.ndarray, num_trained: np.ndarray) -> Score:
    """Share of the trained tokens that are the likeliest ones, over rows. Shapes (rows,)."""
    return ratio_score("token_accuracy", num_correct, num_trained)


def perplexity(loss: Score) -> Score:
    """exp(loss), its error by the delta method: the derivative at the loss times the loss's error.

    A loss over MAX_EXPONENT counts as that: the exponential of a higher one is not finite.
    """
    if loss.value > MAX_EXPONENT:
        return Score("perplexity", math.exp(MAX_EXPONENT), None, loss.n)
    value = math.exp(loss.value)
    return Score("perplexity", value, None if loss.stderr is None else value * loss.stderr, loss.n)


def ratio_score(metric: str, numerators: np.ndarray, denominators: np.ndarray) -> Score:
    """The ratio of sums over rows, its error by linearisation (Cochran 1977, 6.3). Shapes (rows,)."""
    n, total = len(numerators), float(denominators.sum())
    ratio = float(numerators.sum()) / total
    residuals = numerators - ratio * denominators
    variance = float((residuals**2).sum()) * n / max(n - 1, 1)
    return Score(metric, ratio, math.sqrt(variance) / total if n > 1 else None, n)


def mean_score(metric: str, values: np.ndarray) -> Score:
    """values: shape (rows,)."""
    n = len(values)
    stderr = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None
    return Score(metric, float(np.mean(values)), stderr, n)
