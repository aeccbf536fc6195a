"""Two models on the same rows: how far apart their scores are, with an interval of the paired difference."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa

from sft_core.evaluate.metrics import paired_gain

MIN_SHARED = 2  # rows; an interval needs as many


@dataclasses.dataclass(frozen=True)
class Difference:
    """second - first over the rows that both scored, and its 95 % interval."""

    metric: str
    n: int
    value: float
    low: float
    high: float


def difference(metric: str, first: pa.Table, second: pa.Table) -> Difference | None:
    """Of two tables of ROWS; None where fewer than two rows can be compared, or the rows do not tell the metric.

    Rows are the same where the prompt is, and what was wanted: the answer, or for the loss the whole conversation in
    as many trained tokens.
    """
    values = _losses if metric == "loss" else _correct
    before, after = (values(metric, table) for table in (first, second))
    shared = sorted(before.keys() & after.keys(), key=str)
    if len(shared) < MIN_SHARED:
        return None
    a, b = (np.array([rows[key] for key in shared], dtype=float) for rows in (before, after))
    if metric == "loss":
        num_trained = np.array([key[2] for key in shared], dtype=float)
        a, b = _linear(a, num_trained), _linear(b, num_trained)
    value, low, high = paired_gain(a, b)
    return Difference(metric, len(shared), value, low, high)


def _losses(metric: str, table: pa.Table) -> dict[tuple[Any, ...], float]:
    """The summed loss of each row."""
    keys = zip(*(table[name].to_pylist() for name in ("prompt_hash", "row_id", "num_trained")), strict=True)
    return dict(zip(keys, table["nll"].to_pylist(), strict=True))


def _correct(metric: str, table: pa.Table) -> dict[tuple[Any, ...], float]:
    """What each row that has an answer scored: the column of the metric's name, or of what is right."""
    name = metric if metric in table.column_names else "correct"
    if name not in table.column_names:
        return {}
    keys = zip(table["prompt_hash"].to_pylist(), table["answer"].to_pylist(), strict=True)
    return {key: float(value) for key, value in zip(keys, table[name].to_pylist(), strict=True) if value is not None}


def _linear(nll_sums: np.ndarray, num_trained: np.ndarray) -> np.ndarray:
    """Values whose mean is the loss a trained token, and whose spread is that of this ratio (Cochran 1977, 6.3).

    nll_sums, num_trained: shape (rows,).
    """
    loss = nll_sums.sum() / num_trained.sum()
    return loss + (nll_sums - loss * num_trained) / num_trained.mean()
