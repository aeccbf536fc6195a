"""e: the tests that need a GPU; without one, that they are collected and skipped."""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Iterator

from benchmarks.gpu_parts.process import run_program
from benchmarks.gpu_parts.rows import Context, Row

MOST_S = 150.0
FILES = ["tests/train/test_gpu.py"]  # all tests with the mark; the others would be imported for nothing
OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)")


def run(context: Context) -> Iterator[Row]:
    if importlib.util.find_spec("pytest") is None:
        yield context.row("pytest -m gpu", note="left out: pytest is not installed")
        return
    seconds = max(5.0, min(MOST_S, context.left() - 3))
    begun, output = time.monotonic(), context.folder / "pytest.txt"
    options = ["-m", "gpu", "-vv", "-rfE", "--tb=short", "--color=no", "-p", "no:cacheprovider"]
    command = ["-m", "pytest", *options, f"--basetemp={context.folder / 'pytest'}", *FILES]
    code = run_program(command, seconds=seconds, output=output, environment={})
    print(output.read_text())  # into the log
    yield from outcome_rows(context, output.read_text(), code, time.monotonic() - begun)


def outcome_rows(context: Context, text: str, code: int | None, seconds: float) -> Iterator[Row]:
    """code: None where the time was over."""
    outcomes = dict(found.groups() for line in text.splitlines() if (found := OUTCOME.match(line)))
    counts = {name: [*outcomes.values()].count(name) for name in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    note = ", ".join(f"{number} {name.lower()}" for name, number in counts.items()) + f" in {seconds:.0f} s"
    if code is None:
        note += "; the time was over before the last one"
    elif not outcomes:
        note += f"; exit code {code}: {' '.join(text.split())[-300:]}"
    failed = [test for test, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    passed = None if code is None and not outcomes else not failed and bool(outcomes) and code in (None, 0)
    yield context.row("pytest -m gpu", counts["PASSED"], "passed", note, passed=passed, key="gpu_tests_passed")
    for test in failed:
        short = test.rpartition("::")[2]
        reason = next((line for line in text.splitlines() if line.startswith(("FAILED", "ERROR")) and test in line), "")
        yield context.row(short[:50], note=reason.partition(" - ")[2][:300], passed=False)
