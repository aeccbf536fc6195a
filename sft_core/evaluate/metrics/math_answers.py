"""The metric `numeric`: numbers and expressions, compared by math-verify in another process.

math-verify's timeouts are alarms: only a main thread can set them, and they do not stop code in C. Any thread can
kill a process.
"""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
from types import TracebackType
from typing import Any

from sft_core.evaluate.metrics.metric import Metric
from sft_core.store.code_digest import ROOT

log = logging.getLogger(__name__)
TIMEOUT_S = 10.0
START_S = 120.0  # to import sympy on a machine that is busy


class Numeric(Metric):
    """The output's last number or expression equals the answer's in value."""

    name = "numeric"
    is_share = True
    library = "math-verify"

    def __init__(self, timeout_s: float = TIMEOUT_S):
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    def read(self, answer: str) -> str:
        if not self._ask(answer, None):
            raise ValueError(f"found {answer[:80]!r}; numeric wants a number, or an expression as LaTeX")
        return answer

    def score(self, output: str, wanted: str) -> float:
        return float(self._ask(wanted, output))

    def _ask(self, wanted: str, output: str | None) -> bool:
        """Whether the two are equal; without an output, whether `wanted` can be read.

        False also where the comparison runs out of time or kills the process; both count as a timeout.
        """
        process = self._process or self._start()
        assert process.stdin is not None
        process.stdin.write(json.dumps([wanted, output]).encode() + b"\n")
        process.stdin.flush()
        reply = self._next_line(process, self._timeout_s)
        if reply is None:
            self.num_timeouts += 1
            log.warning(
                "metric=numeric timeout_s=%g an answer is not compared: %.80r", self._timeout_s, output or wanted
            )
            self._end()
        return bool(reply)

    def _start(self) -> subprocess.Popen[bytes]:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            # -P: a file of the working folder must not stand in for a library.
            [sys.executable, "-P", "-m", "sft_core.evaluate.metrics.math_worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        if self._next_line(self._process, START_S) is None:
            self._end()
            raise RuntimeError("the process that compares mathematical answers does not start; see its error above")
        return self._process

    @staticmethod
    def _next_line(process: subprocess.Popen[bytes], timeout_s: float) -> Any:
        """The JSON of the process's next line; None where no line comes in time, or the process ends."""
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], timeout_s)[0]:
            return None
        line = process.stdout.readline()
        return json.loads(line) if line else None

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()
