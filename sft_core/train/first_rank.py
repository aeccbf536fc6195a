"""Runs a function on rank 0 only; every rank gets its answer, or its error."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

Answer = TypeVar("Answer")


def is_first_rank() -> bool:
    """Before the ranks are joined: by torchrun's environment."""
    return int(os.environ.get("RANK", "0")) == 0


def on_first_rank(function: Callable[[], Answer]) -> Answer:
    """What the function returns on the first rank. Called on all ranks together, once they are joined.

    The others get the answer as a pickle. Where the function raises, every rank raises.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    message: list[Any] = [None, None]  # the answer, and the traceback if there is no answer
    error = None
    if PartialState().is_main_process:
        try:
            message[0] = function()
        except Exception as raised:
            error, message[1] = raised, traceback.format_exc()
    broadcast_object_list(message)
    if error is not None:
        raise error
    answer, failure = message
    if failure is not None:
        # Include rank 0's traceback: the launcher shows the error that is written first, which may be this rank's.
        raise RuntimeError(f"the first rank failed:\n{failure.rstrip()}")
    return answer
