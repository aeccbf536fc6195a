"""How many packs of a rank's step are one forward: over one pack of a small model a GPU waits for its launches."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from sft_core.data.packing.plan import PackPlan
from sft_core.train.flops import training_flops
from sft_core.train.models.attention import KNOWS_DOCUMENTS
from sft_core.train.schedule import largest_divisor

if TYPE_CHECKING:
    from sft_core.recipe.sections import Runtime, Training

BUSY_S, REACHED, UNKNOWN_PEAK = 0.1, 0.4, 100e12
USED_SHARE = 0.75  # of the memory: the allocator leaves gaps, and an estimate is one
DOCUMENTS_A_PACK = 8  # attention is the smaller part; how many documents there are matters little
log = logging.getLogger(__name__)


def packs_a_forward(
    asked: int | str,
    *,
    written: int | None,
    plan: PackPlan,
    packs_a_rank: int,
    attention: str,
    together: bool,
    busiest: Callable[[int], int],
) -> int:
    """A divisor of a rank's packs of a step, so that every rank makes as many forwards of as many packs.

    asked: runtime.tokens_per_forward. written: what the checkpoint says that training goes on from; "auto" keeps to it,
    for another number rounds otherwise. attention, together: with attention that knows documents packs cost what they
    cost alone; an L x L mask, or documents that get a forward each, would make them dearer. busiest: of the tokens of
    the longest pack, how many packs `auto` wants at most.
    """
    if attention not in KNOWS_DOCUMENTS or not together:
        if asked != "auto":
            log.warning("tokens_per_forward=ignored attention=%s: a forward takes one pack", attention)
        return 1
    if asked == "auto" and written is not None and packs_a_rank % written == 0:
        return written
    longest = int(np.add.reduceat(plan.num_tokens.astype(np.int64), plan.offsets[:-1]).max())
    number = largest_divisor(packs_a_rank, busiest(longest) if asked == "auto" else int(asked) // longest)
    if written is not None and number != written:
        log.warning("packs_a_forward=%d and the checkpoint's is %d: the same but for rounding", number, written)
    return number


def busiest_packs(
    longest: int,
    *,
    training: Training,
    runtime: Runtime,
    shape: Any,
    dtype: str,
    attention: str,
    memory: float,
    peak: float | None,
) -> int:
    """How many packs of so many tokens keep a GPU busy, of those that fit into its memory; at least 1.

    A forward and backward of a layer is some 40 launches of 5 to 10 microseconds, whatever the tokens: BUSY_S of work
    at the speed that is reached hides them. shape: the model without weights. dtype: of its weights. memory: the
    device's bytes. peak: its FLOP/s by the data sheet, where that is known.
    """
    from sft_core.train.memory.activations import UnknownActivations
    from sft_core.train.memory.estimate import activations_of, bytes_a_parameter

    work = training_flops(shape).of(float(longest), float(longest) ** 2 / DOCUMENTS_A_PACK, float(longest))
    wanted = math.ceil(BUSY_S * REACHED * (peak or UNKNOWN_PEAK) / work)
    if wanted == 1:
        return 1
    try:
        one = activations_of(training, runtime, shape, tokens=longest, dtype=dtype, attention=attention)
    except UnknownActivations as unknown:
        log.info("packs_a_forward=1: what several take is not known (%s)", unknown)
        return 1
    states = shape.num_parameters() * bytes_a_parameter(training, runtime, dtype)
    room = USED_SHARE * memory - states - one.weight_copies
    return max(1, min(wanted, int(room // (one.layers + one.head + one.mask))))


def in_forwards(schedule: np.ndarray, num_ranks: int, packs: int) -> np.ndarray:
    """The slots in the order in which the loader reads them: int64, shape (steps, global_batch_size).

    Slot j * ranks + r is rank r's at micro-step j (schedule.step_packs). The loader hands batches of `packs` neighbours
    to one rank after another: so a rank's next packs stand side by side.
    """
    steps, size = schedule.shape
    by_rank = schedule.reshape(steps, size // (packs * num_ranks), packs, num_ranks)
    return by_rank.swapaxes(2, 3).reshape(steps, size)
