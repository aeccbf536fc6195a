"""How many trained tokens each source gives, and which rows those are. Pure: nothing is read or written.

Repeating a source up to four times is nearly as good as as much new data (Muennighoff et al. 2023, Scaling
Data-Constrained Language Models, section 5): hence a cap on repeats, and a share that it keeps a source from goes to
the others.
"""

from __future__ import annotations

import numpy as np


def fill(available: np.ndarray, shares: np.ndarray, budget: float, max_repeats: float) -> np.ndarray:
    """Trained tokens of each source: float64, shape (sources,). Their sum is the budget, or all are at their cap.

    A source that is held at max_repeats times what it has leaves the rest to the others by their shares, until none
    is over its cap (water-filling). available: trained tokens of each source; shares: in proportion to each other.
    """
    caps = available * max_repeats * (shares > 0)
    filled = np.zeros(len(shares))
    is_open = caps > 0
    while is_open.any():
        left = max(0.0, budget - filled[~is_open].sum())
        filled[is_open] = left * (shares[is_open] / shares[is_open].sum())
        is_over = is_open & (filled >= caps)
        if not is_over.any():
            break
        filled[is_over] = caps[is_over]
        is_open &= ~is_over
    return filled


def draw_tokens(num_trained: np.ndarray, target: float, *, max_repeats: float, rng: np.random.Generator) -> np.ndarray:
    """Rows whose trained tokens come nearest the target: whole copies of one permutation, then its beginning.

    num_trained: of each row, at least 1. Returns indices of rows: int64, shape (drawn,); a larger target only adds
    rows. No more than max_repeats times all tokens are drawn, and no row more often than any other by more than one.
    """
    order = rng.permutation(len(num_trained))
    in_order = np.cumsum(num_trained[order])
    if len(order) == 0:
        return order.astype(np.int64)
    total = int(in_order[-1])
    copies = int(target // total)
    rest = target - copies * total
    before = np.concatenate([[0], in_order])
    count = int(np.argmin(np.abs(before - rest)))
    if copies * total + before[count] > max_repeats * total:
        count -= 1  # what is nearest can be over the cap by a part of a row
    return np.concatenate([np.tile(order, copies), order[:count]]).astype(np.int64)


def requested_rows(asked: dict[str, float | int | None], num_available: int) -> float:
    """Rows that a weight or a count asks for; a part of a row counts. asked: weight and num_rows."""
    if asked["num_rows"] is not None:
        return float(asked["num_rows"])
    return num_available * (1.0 if asked["weight"] is None else float(asked["weight"]))


def normalised(amounts: np.ndarray) -> np.ndarray:
    """Amounts as shares of their sum; all 0 where that is 0."""
    total = amounts.sum()
    return amounts / total if total else np.zeros(len(amounts))
