"""Base and tuned model on the same rows: the difference of each score with its interval, and the rows that changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

NUM_RESAMPLES = 10_000
SEED = 0


Pair = tuple[dict[str, Any], dict[str, Any]]  # a row of ROWS of each side


@dataclasses.dataclass(frozen=True)
class Difference:
    """after - before, as tuned - base, over the n rows that both have, with a 95 % interval; a single row has none."""

    n: int
    value: float
    low: float | None
    high: float | None


def differences(base: pa.Table, tuned: pa.Table, metric: str) -> dict[str, Difference]:
    """Of loss, perplexity, token accuracy, and of the metric where rows were asked; of what no two rows have, nothing.

    Rows are the same where the prompt is, and what was wanted: the answer, or for losses the whole conversation in as
    many trained tokens.
    """

    def columns(pairs: list[Pair], *names: str) -> tuple[np.ndarray, ...]:
        return tuple(np.array([pair[side][name] for pair in pairs], float) for side in (0, 1) for name in names)

    def ratio(*sums: np.ndarray) -> np.ndarray:
        return sums[2] / sums[3] - sums[0] / sums[1]

    def exponential(*sums: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return np.exp(sums[2] / sums[3]) - np.exp(sums[0] / sums[1])

    found = {}
    if trained := paired(base, tuned, "row_id", "num_trained"):
        losses = columns(trained, "nll", "num_trained")
        found = {
            "loss": bootstrapped(losses, ratio),
            "perplexity": bootstrapped(losses, exponential),
            "token_accuracy": bootstrapped(columns(trained, "num_correct", "num_trained"), ratio),
        }
    if asked := _asked(base, tuned):
        found[metric] = mean_difference(*columns(asked, "score"))
    return found


def mean_difference(before: np.ndarray, after: np.ndarray) -> Difference:
    """Of the means over the same rows, shape (rows,) each."""
    return bootstrapped((before, after), lambda *sums: (sums[1] - sums[0]) / len(before))


def bootstrapped(columns: tuple[np.ndarray, ...], statistic: Callable[..., np.ndarray]) -> Difference:
    """A statistic of the columns' sums, and its percentile interval (Efron 1979): whole rows are drawn again.

    columns: float64, shape (rows,) each. statistic: takes the sums of each column, of any one shape. The draws are
    the same for the same number of rows.
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
    """The rows of both that have the same prompt and are the same in these columns, in the order of the base's."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("prompt_hash", *same))

    after = {key(row): row for row in tuned.to_pylist()}
    return [(row, after[key(row)]) for row in base.to_pylist() if key(row) in after]


def _asked(base: pa.Table, tuned: pa.Table) -> list[Pair]:
    pairs = paired(base, tuned, "answer")
    return [pair for pair in pairs if pair[0]["score"] is not None and pair[1]["score"] is not None]


def by_change(base: pa.Table, tuned: pa.Table) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """The pairs that were won (the tuned model scores higher), that were lost, each the largest change first, and those
    in which both score alike, the lowest score first."""
    asked = sorted(_asked(base, tuned), key=lambda pair: -abs(pair[1]["score"] - pair[0]["score"]))
    won = [pair for pair in asked if pair[1]["score"] > pair[0]["score"]]
    lost = [pair for pair in asked if pair[1]["score"] < pair[0]["score"]]
    same = [pair for pair in asked if pair[1]["score"] == pair[0]["score"]]
    return won, lost, sorted(same, key=lambda pair: pair[1]["score"])
