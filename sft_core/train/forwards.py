"""How many packs of a rank's step are one forward: over one pack of a small model a GPU waits for its launches."""

from __future__ import annotations

import logging

import numpy as np

from sft_core.data.packing import PackPlan
from sft_core.train.attention import KNOWS_DOCUMENTS

log = logging.getLogger(__name__)


def packs_a_forward(
    asked: int | str,
    *,
    written: int | None,
    plan: PackPlan,
    packs_a_rank: int,
    attention: str,
    together: bool,
) -> int:
    """A divisor of a rank's packs of a step, so that every rank makes as many forwards of as many packs.

    asked: runtime.tokens_per_forward. written: what the checkpoint says that training goes on from; "auto" keeps to it,
    for another number rounds otherwise. attention, together: with attention that knows documents packs cost what they
    cost alone; an L x L mask, or documents that get a forward each, would make them dearer.
    """
    if attention not in KNOWS_DOCUMENTS or not together:
        if asked != "auto":
            log.warning("tokens_per_forward=ignored attention=%s: a forward takes one pack", attention)
        return 1
    if asked == "auto":
        return written if written is not None and packs_a_rank % written == 0 else 1
    longest = int(np.add.reduceat(plan.num_tokens.astype(np.int64), plan.offsets[:-1]).max())
    number = largest_divisor(packs_a_rank, int(asked) // longest)
    if written is not None and number != written:
        log.warning("packs_a_forward=%d and the checkpoint's is %d: the same but for rounding", number, written)
    return number


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor that is at most `most`; 1 where that is less.

    >>> largest_divisor(12, 5)
    4
    """
    return next(divisor for divisor in range(max(1, min(most, number)), 0, -1) if number % divisor == 0)


def in_forwards(schedule: np.ndarray, num_ranks: int, packs: int) -> np.ndarray:
    """The slots in the order in which the loader reads them: int64, shape (steps, global_batch_size).

    Slot j * ranks + r is rank r's at micro-step j (schedule.step_packs). The loader hands batches of `packs` neighbours
    to one rank after another: so a rank's next packs stand side by side.
    """
    steps, size = schedule.shape
    by_rank = schedule.reshape(steps, size // (packs * num_ranks), packs, num_ranks)
    return by_rank.swapaxes(2, 3).reshape(steps, size)
