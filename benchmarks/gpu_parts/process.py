"""Processes of the benchmark itself, started ahead of their turn: they import while another one measures, and wait."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from sft_core.lifetime import die_with_parent

GRACE_S = 3.0  # that a process has to end by itself when its time is over


class Ahead:
    """`benchmarks/gpu.py ARGUMENTS` in a process that begins when it is told to."""

    def __init__(
        self,
        arguments: list[str],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        own_group: bool = False,
    ):
        """own_group: its own processes end with it. To be called on the main thread, for whose end the kernel looks."""
        script = Path(__file__).resolve().parents[1] / "gpu.py"
        self._own_group = own_group
        with log.open("a") as file:
            self._process = subprocess.Popen(
                [sys.executable, str(script), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={**os.environ, **(environment or {})},
                start_new_session=own_group,
                preexec_fn=functools.partial(die_with_parent, os.getpid()),
            )

    def go(self, order: dict[str, Any], seconds: float) -> Iterator[dict[str, Any]]:
        """What it tells, line by line, until it ends. Raises TimeoutError when its time is over, RuntimeError when it
        did not end well; it is gone then."""
        try:
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it ended already, and its code says so
                self._process.stdin.write(json.dumps(order) + "\n")
                self._process.stdin.close()
            yield from self._lines(time.monotonic() + seconds)
            code = self._process.wait(timeout=60)
        finally:
            self.end()
        if code:
            raise RuntimeError(f"the process ended with code {code}; see its log")

    def _lines(self, deadline: float) -> Iterator[dict[str, Any]]:
        lines: queue.Queue[str | None] = queue.Queue()

        def read(stream: IO[str]) -> None:
            for line in stream:
                lines.put(line)
            lines.put(None)

        assert self._process.stdout is not None
        threading.Thread(target=read, args=(self._process.stdout,), daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError("its time is over") from None
            if line is None:
                return
            yield json.loads(line)

    def end(self) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                if self._own_group:
                    os.killpg(self._process.pid, signal.SIGKILL)
                else:
                    self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


@contextlib.contextmanager
def lines_only() -> Iterator[IO[str]]:
    """A stream for what this process tells: its standard output. What libraries print goes to the log meanwhile."""
    own = os.fdopen(os.dup(1), "w", buffering=1)
    sys.stdout.flush()
    os.dup2(2, 1)
    try:
        yield own
    finally:
        own.close()


def order() -> dict[str, Any]:
    """Waits until it is told to begin. Ends this process where nobody will."""
    line = sys.stdin.readline()
    if not line:
        sys.exit(0)
    return json.loads(line)


def alone_of_its_group() -> dict[str, str]:
    """What torchrun tells a rank that is alone: a trainer on a CPU, and any under DeepSpeed or FSDP, wants a group."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    group = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in group.items()}}


def environment_of_others() -> dict[str, str]:
    """For programs that start ranks of their own: this checkout's modules, and no group that this process is in."""
    group = {*alone_of_its_group()}
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {**{name: value for name, value in os.environ.items() if name not in group}, "PYTHONPATH": path}
