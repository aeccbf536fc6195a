"""The GPUs that scoring may use, each by one process of this machine at a time. torch is not imported here."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from sft_core.train.accelerator import has_gpu

log = logging.getLogger(__name__)
VISIBLE = "CUDA_VISIBLE_DEVICES"
COUNT = "import torch; print(torch.cuda.device_count())"


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs of this process. Empty where torch finds none."""
    if not has_gpu():
        return []
    # torch counts: a machine may have GPUs that its build, or a wrong index in the variable, leaves out.
    counted = subprocess.run([sys.executable, "-P", "-c", COUNT], capture_output=True, text=True, check=True)
    num_gpus = int(counted.stdout)
    named = os.environ.get(VISIBLE)
    return [str(number) for number in range(num_gpus)] if named is None else named.split(",")[:num_gpus]


def gpus_of_share(gpus: Sequence[str], share: int, size: int) -> list[str]:
    """The `size` GPUs that a share of the tasks is scored on: share after share the next ones, then from the first."""
    groups = [list(gpus[start : start + size]) for start in range(0, len(gpus) - size + 1, size)]
    return groups[share % len(groups)] if groups else list(gpus)


@contextlib.contextmanager
def gpus_by_themselves(gpus: Sequence[str]) -> Iterator[None]:
    """These GPUs for one process of the user at a time, whatever its run: two models may not fit. Waits, and says so.

    Enter it before any lock of the store: who holds one waits for no GPU, so nobody waits in a circle.
    A lock is of a name: an index and a UUID for the same GPU are two locks, so runs of one machine name GPUs one way.
    """
    # Training takes no lock: in a flow it is over before scoring begins. Two runs on one machine can still meet.
    with contextlib.ExitStack() as stack:
        for gpu in sorted(gpus):  # all in the same order, or two that want the same pair wait for each other
            name = f"sft-flow-gpu-{os.getuid()}-{gpu.strip()}.lock"
            lock = FileLock(Path(tempfile.gettempdir()) / name.replace(os.sep, "-"))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                log.info("waiting: another process scores on GPU %s", gpu)
                lock.acquire()
            stack.callback(lock.release)
        yield
