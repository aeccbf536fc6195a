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

from sft_core.die_with_parent import die_with_parent


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
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self, seconds: float) -> None:
        """Until it has imported all. Raises TimeoutError or RuntimeError, and it is gone then."""
        try:
            if self._line(time.monotonic() + seconds) is None:
                raise RuntimeError(f"the process ended with code {self._process.wait()} before it began")
        except BaseException:
            self.end()
            raise

    def go(self, order: dict[str, Any], seconds: float) -> Iterator[dict[str, Any]]:
        """What it tells, line by line, until it ends. Raises TimeoutError when its time is over, RuntimeError when it
        did not end well; it is gone then."""
        deadline = time.monotonic() + seconds
        try:
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it ended already, and its code says so
                self._process.stdin.write(json.dumps(order) + "\n")
                self._process.stdin.close()
            while (line := self._line(deadline)) is not None:
                yield json.loads(line)
            code = self._process.wait(timeout=60)
        finally:
            self.end()
        if code:
            raise RuntimeError(f"the process ended with code {code}")

    def _line(self, deadline: float) -> str | None:
        """None at its end. Raises TimeoutError."""
        try:
            return self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise TimeoutError("its time is over") from None

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError):  # it was closed, for the process is gone
            for line in self._process.stdout:
                self._lines.put(line)
        self._lines.put(None)

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


def order(lines: IO[str]) -> dict[str, Any]:
    """Says that all is imported and waits until it is told to begin. Ends this process where nobody will."""
    lines.write(json.dumps({"ready": True}) + "\n")
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


def run_program(command: list[str], *, seconds: float, output: Path, environment: Mapping[str, str]) -> int | None:
    """The exit code of Python's `command` in the checkout; None where its time was over, and it is gone then."""
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=Path(__file__).resolve().parents[2],
            env={**environment_of_others(), **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=functools.partial(die_with_parent, os.getpid()),
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                process.kill()  # what it started dies with it
                process.wait()
