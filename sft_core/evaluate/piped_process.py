"""A child process with a pipe for messages both ways. It ends when this process ends."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from collections.abc import Mapping, Sequence
from types import TracebackType

LOOK_S = 1.0  # between checks that it is alive: its own children may hold the pipe open after it died
END_S = 30.0  # to free a GPU


class ProcessEnded(RuntimeError):
    """The child process ended. status: as subprocess has it, negative for the signal that killed it."""

    def __init__(self, status: int):
        super().__init__(f"ended with exit status {status}")
        self.status = status

    @property
    def is_killed(self) -> bool:
        return self.status < 0


class PipedProcess:
    """A command with two more arguments: the file descriptor of its end of the pipe, and the id of this process.

    It ends once the pipe is closed. Start it in the main thread: the kernel ends it with the thread that started it.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]):
        self._pipe, theirs = multiprocessing.Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(os.getpid())],
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    @property
    def id(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def send(self, message: bytes) -> None:
        """Raises ProcessEnded."""
        try:
            self._pipe.send_bytes(message)
        except OSError:
            raise ProcessEnded(self._wait()) from None

    def receive(self) -> bytes:
        """The next message, however long it takes. Raises ProcessEnded when the process ends first."""
        try:
            while not self._pipe.poll(LOOK_S):
                if not self.is_running and not self._pipe.poll():
                    raise ProcessEnded(self._wait())
            return self._pipe.recv_bytes()
        except (EOFError, OSError):
            raise ProcessEnded(self._wait()) from None

    def close(self) -> None:
        """Closes the pipe and waits for the process to end. A process that does not end is killed."""
        self._pipe.close()
        self._wait()

    def kill(self) -> None:
        self._process.kill()
        self.close()

    def _wait(self) -> int:
        try:
            return self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def __enter__(self) -> PipedProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self.kill()
