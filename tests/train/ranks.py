"""Ranks that a test starts, watches and kills, without torchrun: a start takes a second in place of ten."""

import multiprocessing
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft_core.train.job import TrainJob, read_job
from sft_core.train.strategy import environment


def rank(job: str, number: int, size: int, port: int, log: str) -> None:
    """One rank, in a process that has its libraries loaded already."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    group = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in group.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"})
    strategy = read_job(TrainJob, Path(job)).runtime.distributed
    os.environ.update({**environment(strategy), "DS_ACCELERATOR": "cpu"})
    from sft_core.train.main import main

    main(Path(job))


class Attempt:
    """The ranks of one start."""

    def __init__(self, job: Path, size: int, log: Path, target: Callable[[str, int, int, int, str], None] = rank):
        context = multiprocessing.get_context("forkserver")
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        arguments = (size, port, str(log))
        self.ranks = [context.Process(target=target, args=(str(job), number, *arguments)) for number in range(size)]
        for process in self.ranks:
            process.start()

    def is_alive(self) -> bool:
        return any(process.is_alive() for process in self.ranks)

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()
        self.wait()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether all ended by then."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        for process in self.ranks:
            process.join(None if end is None else max(0.0, end - time.monotonic()))
        return not self.is_alive()


def rank_that_notes_what_it_opens(job: str, number: int, size: int, port: int, log: str) -> None:
    """A rank that writes the name of each file of a checkpoint that its Python opens to read: see `opened`."""
    notes = os.open(f"{log}.opened-{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and "/checkpoints/" in str(arguments[0]):
            os.write(notes, f"{str(arguments[0]).partition('/checkpoints/')[2]}\n".encode())

    sys.addaudithook(note)
    rank(job, number, size, port, log)


def opened(out: Path, number: int) -> list[str]:
    """As `checkpoint-N/file`, by that rank of the last start that noted it."""
    return (out / "logs" / f"ranks.log.opened-{number}").read_text().splitlines()


def error_of(out: Path) -> str:
    """With which the ranks ended."""
    return "\n".join(path.read_text().rstrip() for path in sorted(out.glob("error-rank*.txt")))


def wait_for_checkpoint(out: Path, step: int, attempt: Attempt) -> None:
    end = time.monotonic() + 90
    while not (out / "checkpoints" / f"checkpoint-{step}").exists() and attempt.is_alive() and time.monotonic() < end:
        time.sleep(0.005)


def steps_of(text: str) -> list[int]:
    return [int(step) for step in re.findall(r"^step=(\d+)/", text, re.MULTILINE)]
