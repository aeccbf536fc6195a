"""How many packs share one forward: with one pack of a small model, a GPU waits for kernel launches."""

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
USED_SHARE = 0.75  # of the memory: the allocator leaves gaps, and the estimate has errors
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
    """Packs of one forward: a divisor of packs_a_rank, so that all forwards of all ranks have equally many.

    asked: runtime.tokens_per_forward. written: the number in the checkpoint that training resumes from; "auto" keeps
    it, because another number rounds differently. attention, together: several packs share a forward only if attention
    takes the bounds of documents and documents share forwards; otherwise an L x L mask or a forward per document makes
    several packs cost more than each alone. busiest: maps the tokens of the longest pack to the number of packs that
    `auto` wants at most.
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
        log.warning("packs_a_forward=%d, the checkpoint has %d: results differ by rounding", number, written)
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
    """How many packs of `longest` tokens keep a GPU busy, limited to those that fit into its memory; at least 1.

    A layer's forward and backward are some 40 launches of 5 to 10 microseconds, for any number of tokens; BUSY_S of
    work at the share REACHED of the peak hides them. shape: the model without weights. dtype: of its weights. memory:
    the device's bytes. peak: its FLOP/s by the data sheet; None: unknown.
    """
    from sft_core.train.memory.activations import UnknownActivations
    from sft_core.train.memory.estimate import activations_of, bytes_a_parameter

    work = training_flops(shape).of(float(longest), float(longest) ** 2 / DOCUMENTS_A_PACK, float(longest))
    wanted = math.ceil(BUSY_S * REACHED * (peak or UNKNOWN_PEAK) / work)
    if wanted == 1:
        return 1
    try:
        of_pack = activations_of(training, runtime, shape, tokens=longest, dtype=dtype, attention=attention)
    except UnknownActivations as unknown:
        log.info("packs_a_forward=1: the memory of several packs is unknown (%s)", unknown)
        return 1
    states = shape.num_parameters() * bytes_a_parameter(training, runtime, dtype)
    room = USED_SHARE * memory - states - of_pack.weight_copies
    return max(1, min(wanted, int(room // (of_pack.layers + of_pack.head + of_pack.mask))))


def in_forwards(schedule: np.ndarray, num_ranks: int, packs: int) -> np.ndarray:
    """The slots in the order in which the loader reads them: int64, shape (steps, global_batch_size).

    Slot j * ranks + r belongs to rank r at micro-step j (schedule.step_packs). The loader deals batches of `packs`
    neighbours to one rank after another, so the packs of a rank's forward are put side by side.
    """
    steps, size = schedule.shape
    by_rank = schedule.reshape(steps, size // (packs * num_ranks), packs, num_ranks)
    return by_rank.swapaxes(2, 3).reshape(steps, size)
