"""Scores with their counts and standard errors."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

# Some templates open the block in the prompt: then the output begins inside it.
_THINKING = re.compile(r"\A((?!<think>).)*?</think>|<think>.*?(</think>|\Z)", re.DOTALL)
Z_95 = 1.959964  # two-sided 95 % of the normal distribution


@dataclasses.dataclass(frozen=True)
class Score:
    """A mean over n rows with its standard error, which a single row does not have."""

    metric: str
    value: float
    stderr: float | None
    n: int


def strip_thinking(text: str) -> str:
    """What is left of a generated answer without its <think> block; nothing when the block never ends."""
    return _THINKING.sub("", text).strip()


def exact_match(output: str, answer: str) -> bool:
    return strip_thinking(output) == answer.strip()


def token_loss(nll_sums: np.ndarray, num_trained: np.ndarray) -> Score:
    """Loss a trained token over rows: the ratio of sums, its error by linearisation (Cochran 1977, 6.3).

    nll_sums, num_trained: shape (rows,).
    """
    n, tokens = len(nll_sums), float(num_trained.sum())
    loss = float(nll_sums.sum()) / tokens
    residuals = nll_sums - loss * num_trained
    variance = float((residuals**2).sum()) * n / max(n - 1, 1)
    return Score("loss", loss, math.sqrt(variance) / tokens if n > 1 else None, n)


def mean_score(metric: str, values: np.ndarray) -> Score:
    """values: shape (rows,)."""
    n = len(values)
    stderr = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None
    return Score(metric, float(np.mean(values)), stderr, n)


def paired_gain(before: np.ndarray, after: np.ndarray) -> tuple[float, float, float]:
    """Mean of after - before over the same rows, and its 95 % interval. Shapes (rows,), equal."""
    score = mean_score("gain", after.astype(float) - before.astype(float))
    assert score.stderr is not None, "an interval needs two rows"
    return score.value, score.value - Z_95 * score.stderr, score.value + Z_95 * score.stderr
