"""e: the tests that need a GPU; without one, that they are collected and skipped."""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Iterator

from benchmarks.gpu_parts.process import run_program
from benchmarks.gpu_parts.rows import Case, Context, Row

MOST_S = 150.0
# All files with marked tests, in the order of what they are worth; the others would be imported for nothing.
FILES = ["tests/train/test_on_device.py", "tests/train/test_gpu.py", "tests/train/memory/test_activations.py"]
OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)")


def run(context: Context) -> Iterator[Row]:
    (tests,) = listed(context)
    yield from tests.run()  # also where its seconds are not left: some of the tests are worth more than none


def listed(context: Context) -> list[Case]:
    return [Case("pytest -m gpu", 95, lambda: tested(context), is_core=True)]


def tested(context: Context) -> Iterator[Row]:
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
    if code is None and not outcomes:
        passed = None
    else:
        is_proof = counts["PASSED"] > 0 or not context.on_gpu  # without a GPU all are skipped
        passed = not failed and bool(outcomes) and code in (None, 0) and is_proof
    yield context.row("pytest -m gpu", counts["PASSED"], "passed", note, passed=passed, key="gpu_tests_passed")
    for test in failed:
        short = test.rpartition("::")[2]
        reason = next((line for line in text.splitlines() if line.startswith(("FAILED", "ERROR")) and test in line), "")
        yield context.row(short[:50], note=reason.partition(" - ")[2][:300], passed=False)
