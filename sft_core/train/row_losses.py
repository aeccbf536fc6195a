"""Losses of the selection rows at one step, as numpy arrays: modules that decide by them need no torch."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class RowLosses:
    """The summed loss, trained tokens and source number of each selection row, in the order of the plan."""

    nll: np.ndarray  # float64, shape (rows,)
    num_trained: np.ndarray  # float64, shape (rows,)
    source: np.ndarray  # int64, shape (rows,)
    num_correct: np.ndarray | None = None  # float64, shape (rows,): trained tokens with the highest likelihood
    answers: np.ndarray | None = None  # float64, shape (rows,): scores of generated answers; NaN of rows without one
    answer_flops: float = 0.0

    @property
    def by_row(self) -> np.ndarray:
        """The loss per trained token: shape (rows,)."""
        return self.nll / self.num_trained

    def by_source(self, names: list[str]) -> dict[str, float]:
        """The loss per trained token of each source."""
        sums, counts = (np.bincount(self.source, of, len(names)) for of in (self.nll, self.num_trained))
        return dict(zip(names, (sums / counts).tolist(), strict=True))
