"""Stopping a run: SIGTERM or Ctrl-C to its scheduler, or to all of its processes, lets a training save first.

Metaflow's scheduler has no handler of SIGTERM: it dies, and its tasks with it. On Ctrl-C it kills them after 5 seconds.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Any

import psutil

from steps.runs.service import RECORDS

STOPPING = "SFT_STOPPING"  # in the environment of tasks that a stopping scheduler starts


def stop_gently(arguments: Sequence[str]) -> None:
    """Makes a scheduler pass the first SIGTERM or Ctrl-C on to its tasks as SIGTERM, and go on until they have ended.

    A training saves a checkpoint and fails; other tasks die of it. A task that starts after that, as a retry does, ends
    at once. arguments: of the command line; other commands than a run or a resume have no scheduler.
    """
    if "step" in arguments and STOPPING in os.environ:
        raise SystemExit("the run is stopping: this task does not start")
    if not set(RECORDS) & set(arguments):
        return
    scheduler = psutil.Process()

    def stop(number: int, frame: Any) -> None:
        if STOPPING in os.environ:
            return
        os.environ[STOPPING] = "1"
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        message = (
            f"{name}: a training saves a checkpoint after this step, then the run ends; `sft resume` continues it\n"
        )
        os.write(2, message.encode())  # not print: the signal may interrupt one
        for task in scheduler.children():
            try:
                if "step" in task.cmdline():  # Metaflow's helpers go on: the scheduler still talks to them
                    task.terminate()
            except psutil.NoSuchProcess:
                continue

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
