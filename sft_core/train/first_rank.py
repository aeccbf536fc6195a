"""Work that the first of all ranks does alone, on whichever node: each rank has its answer, or its error."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, TypeVar

Answer = TypeVar("Answer")


def on_first_rank(function: Callable[[], Answer]) -> Answer:
    """What the function returns on the first rank; called on all ranks together, once their process group is there.

    The answer goes to the others as a pickle. Where the function raises, every rank raises.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    told: list[Any] = [None, None]  # the answer, and the traceback if there is no answer
    error = None
    if PartialState().is_main_process:
        try:
            told[0] = function()
        except Exception as raised:
            error, told[1] = raised, traceback.format_exc()
    broadcast_object_list(told)
    if error is not None:
        raise error
    if told[1] is not None:
        # With its words: the launcher shows the error of the rank that fails first, and that may be this one.
        raise RuntimeError(f"the first rank failed:\n{told[1].rstrip()}")
    return told[0]
