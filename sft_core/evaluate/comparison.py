"""Base and tuned model on the same rows: the difference of each score with its interval, and the rows that changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from sft_core.evaluate.rows import ScoredRow

NUM_RESAMPLES = 10_000
SEED = 0

Pair = tuple[ScoredRow, ScoredRow]  # the same row scored by the base and by the tuned model


@dataclasses.dataclass(frozen=True)
class Difference:
    """after - before, as tuned - base, over the n rows that both have, with a 95 % interval; a single row has none."""

    n: int
    value: float
    low: float | None
    high: float | None


def differences(base: pa.Table, tuned: pa.Table, metric: str) -> dict[str, Difference]:
    """The differences of loss, perplexity and token accuracy, and of the metric where rows were asked.

    A score that no row has on both sides is left out. Two rows are the same row if they have the same prompt and the
    same answer; for losses, the same conversation and number of trained tokens.
    """

    def columns(pairs: list[Pair], *names: str) -> tuple[np.ndarray, ...]:
        sides: tuple[list[Mapping[str, Any]], ...] = ([base for base, _ in pairs], [tuned for _, tuned in pairs])
        return tuple(np.array([row[name] for row in rows], float) for rows in sides for name in names)

    def ratio(*sums: np.ndarray) -> np.ndarray:
        return sums[2] / sums[3] - sums[0] / sums[1]

    def exponential(*sums: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return np.exp(sums[2] / sums[3]) - np.exp(sums[0] / sums[1])

    by_metric = {}
    if trained := paired(base, tuned, "row_id", "num_trained"):
        losses = columns(trained, "nll", "num_trained")
        by_metric = {
            "loss": bootstrapped(losses, ratio),
            "perplexity": bootstrapped(losses, exponential),
            "token_accuracy": bootstrapped(columns(trained, "num_correct", "num_trained"), ratio),
        }
    if asked := _asked(base, tuned):
        by_metric[metric] = mean_difference(*columns(asked, "score"))
    return by_metric


def mean_difference(before: np.ndarray, after: np.ndarray) -> Difference:
    """The difference of two means over the same rows. before, after: shape (rows,)."""
    return bootstrapped((before, after), lambda *sums: (sums[1] - sums[0]) / len(before))


def bootstrapped(columns: tuple[np.ndarray, ...], statistic: Callable[..., np.ndarray]) -> Difference:
    """A statistic of the columns' sums, with its percentile interval by a bootstrap over rows (Efron 1979).

    columns: float64, shape (rows,) each. statistic: a function of the columns' sums, which may be arrays. The draws
    depend on the number of rows alone.
    """
    from scipy.stats import bootstrap

    def of_rows(*drawn: np.ndarray, axis: int) -> np.ndarray:
        return statistic(*(column.sum(axis=axis) for column in drawn))

    n = len(columns[0])
    value = float(of_rows(*columns, axis=-1))
    if n < 2:
        return Difference(n, value, None, None)
    low, high = bootstrap(
        columns,
        of_rows,
        paired=True,
        vectorized=True,
        n_resamples=NUM_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(SEED),
        batch=max(1, 2_000_000 // n),  # some 100 MB, whatever the number of rows
    ).confidence_interval
    return Difference(n, value, float(low), float(high))


def paired(base: pa.Table, tuned: pa.Table, *same: str) -> list[Pair]:
    """The rows of both tables with the same prompt and equal values in the columns `same`, in the base's order."""

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("prompt_hash", *same))

    after = {key(row): row for row in tuned.to_pylist()}
    return [(row, after[key(row)]) for row in base.to_pylist() if key(row) in after]


def _asked(base: pa.Table, tuned: pa.Table) -> list[Pair]:
    pairs = paired(base, tuned, "answer")
    return [pair for pair in pairs if pair[0]["score"] is not None and pair[1]["score"] is not None]


def by_change(base: pa.Table, tuned: pa.Table) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """(won, lost, same): the pairs in which the tuned model scores higher, lower, and the same as the base model.

    Won and lost begin with the largest change, the same with the lowest score.
    """
    asked = sorted(_asked(base, tuned), key=lambda pair: -abs(_gain(pair)))
    won = [pair for pair in asked if _gain(pair) > 0]
    lost = [pair for pair in asked if _gain(pair) < 0]
    same = [pair for pair in asked if _gain(pair) == 0]
    return won, lost, sorted(same, key=lambda pair: pair[1]["score"] or 0.0)


def _gain(pair: Pair) -> float:
    before, after = (row["score"] for row in pair)
    assert before is not None and after is not None, "only asked rows are compared"
    return after - before
