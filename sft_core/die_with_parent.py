"""No orphans: a process of ours ends with the one that started it."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from pathlib import Path

STARTED_BY = "SFT_STARTED_BY"  # the variable by which a process tells those below it who started them
_PR_SET_PDEATHSIG = 1


def die_with_parent(started_by: int | None = None) -> None:
    """Ask the kernel to kill this process when its parent ends, however that ends (Linux; elsewhere no effect).

    started_by: the id of a process above this one, by default that of multiprocessing or of STARTED_BY. A process that
    is not below it any more has lost its parent before the call and gets no signal from the kernel: it ends here.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if started_by is None:
        forker = multiprocessing.parent_process()
        started_by = forker.pid if forker is not None else int(os.environ.get(STARTED_BY, parent))
    # After the call: a parent that ends from here on is the kernel's.
    if os.getppid() != parent or (started_by is not None and started_by not in _upwards(os.getpid())):
        os.kill(os.getpid(), signal.SIGKILL)


def _upwards(process: int) -> list[int]:
    """A process, its parent and so on, as far up as this user sees."""
    found = [process]
    try:
        while process > 0:
            status = Path(f"/proc/{process}/stat").read_text()
            process = int(status.rpartition(")")[2].split()[1])  # behind the name, which may hold anything
            found.append(process)
    except OSError:
        pass  # it ended, and with it what is below; or it is another user's
    return found
