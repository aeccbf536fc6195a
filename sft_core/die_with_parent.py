"""No orphans: a child process ends with the process that started it."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from pathlib import Path

STARTED_BY = "SFT_STARTED_BY"  # the environment variable with the id of the process that started the ones below it
_PR_SET_PDEATHSIG = 1


def die_with_parent(started_by: int | None = None) -> None:
    """Ask the kernel to kill this process when its parent ends, however that ends (Linux; elsewhere no effect).

    started_by: the id of a process above this one; default: multiprocessing's parent, or STARTED_BY. A process that is
    not below it any more lost its parent before the call and would get no signal from the kernel: it ends here.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if started_by is None:
        forker = multiprocessing.parent_process()
        started_by = forker.pid if forker is not None else int(os.environ.get(STARTED_BY, parent))
    # Check after the call: from there on the kernel watches the parent.
    if os.getppid() != parent or (started_by is not None and started_by not in _upwards(os.getpid())):
        os.kill(os.getpid(), signal.SIGKILL)


def _upwards(process: int) -> list[int]:
    """The ids of a process, its parent and so on, as far up as this user may read."""
    ids = [process]
    try:
        while process > 0:
            status = Path(f"/proc/{process}/stat").read_text()
            process = int(status.rpartition(")")[2].split()[1])  # after the name, which may hold any character
            ids.append(process)
    except OSError:
        pass  # the process ended, or is another user's
    return ids
