"""The number of trained tokens that each source gives, and their rows. Pure: nothing is read or written.

Repeating a source up to four times is nearly as good as new data (Muennighoff et al. 2023, Scaling Data-Constrained
Language Models, section 5). Hence the cap on repeats: tokens that a source at its cap cannot give come from the others.
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np


class SourceRequest(TypedDict):
    """How much of a source the recipe asks for."""

    name: str
    weight: float | None
    num_rows: int | None
    trained_token_share: float | None


def fill(available: np.ndarray, shares: np.ndarray, budget: float, max_repeats: float) -> np.ndarray:
    """Trained tokens of each source: float64, shape (sources,). Their sum is the budget, or all are at their cap.

    A source is capped at max_repeats times its tokens. The rest goes to the others by their shares, until none is over
    its cap (water-filling). available: trained tokens of each source; shares: in proportion to each other.
    """
    caps = available * max_repeats * (shares > 0)
    filled = np.zeros(len(shares))
    is_open = caps > 0
    while is_open.any():
        rest = max(0.0, budget - filled[~is_open].sum())
        filled[is_open] = rest * (shares[is_open] / shares[is_open].sum())
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
        count -= 1  # the nearest count can be over the cap by a part of a row
    return np.concatenate([np.tile(order, copies), order[:count]]).astype(np.int64)


def requested_rows(request: SourceRequest, num_available: int) -> float:
    """The rows that num_rows or the weight asks for, with fractions of a row."""
    if request["num_rows"] is not None:
        return float(request["num_rows"])
    return num_available * (1.0 if request["weight"] is None else float(request["weight"]))


def normalised(amounts: np.ndarray) -> np.ndarray:
    """Amounts as shares of their sum; all 0 where that is 0."""
    total = amounts.sum()
    return amounts / total if total else np.zeros(len(amounts))
