"""j: the quickstart flow on this machine, then again with every output in its store."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.gpu_parts.jobs import ROOT
from benchmarks.gpu_parts.process import run_program
from benchmarks.gpu_parts.rows import Case, Context, Row, cases

CPU_S = 180.0  # minutes; a GPU's machine has more cores as well


def run(context: Context) -> Iterator[Row]:
    if importlib.util.find_spec("metaflow") is None:
        yield context.row("quickstart flow", note="left out: metaflow is not installed")
    elif not context.on_gpu and context.left() < CPU_S:
        note = f"left out: it takes about {CPU_S:.0f} s on a CPU, {context.left():.0f} are left"
        yield context.row("quickstart flow", note=note)
    else:
        yield from cases(context, listed(context))


def listed(context: Context) -> list[Case]:
    return [Case("quickstart flow", 45, lambda: flow_rows(context), is_core=True)]


def flow_rows(context: Context) -> Iterator[Row]:
    if (seconds := _timed(context)) is None:
        yield context.row("quickstart flow", note="ended, for its time was over")
        return
    yield context.row("quickstart flow", seconds, "s", key="quickstart_s")
    yield from again_rows(context, lambda: _timed(context))


def again_rows(context: Context, run_again: Callable[[], float | None]) -> Iterator[Row]:
    """run_again: the flow once more, over the store that it has filled."""
    name, before = "again, with all in the store", outputs(context.folder / "store")
    assert before, "the flow left no output"
    seconds = run_again()
    after = outputs(context.folder / "store")
    built = sorted({path.parent.parent.name for path, when in after.items() if before.get(path) != when})
    if built:
        yield context.row(name, seconds, "s", f"it built again: {', '.join(built)}", passed=False)
    elif seconds is None:
        yield context.row(name, note="ended, for its time was over")
    else:
        note = f"{len(before)} outputs, none built again"
        yield context.row(name, seconds, "s", note, passed=True, key="quickstart_again_s")


def outputs(store: Path) -> dict[Path, int]:
    """The manifest of each output, and when it was written."""
    return {path: path.stat().st_mtime_ns for path in store.glob("[!.]*/*/manifest.json")}


def _timed(context: Context) -> float | None:
    """Seconds; None where the time was over. Raises RuntimeError with the end of its output where it failed."""
    command = [str(ROOT / "flows" / "sft_flow.py"), "run", "--set", f"runtime.store={context.folder / 'store'}"]
    settings = {"METAFLOW_USER": "benchmark", "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(context.folder)}
    begun, output = time.monotonic(), context.folder / "flow.txt"
    code = run_program(command, seconds=max(1.0, context.left() - 2), output=output, environment=settings)
    if code:
        print(output.read_text())  # into the log
        raise RuntimeError(f"the flow failed: {' '.join(output.read_text().split())[-300:]}")
    return None if code is None else time.monotonic() - begun
