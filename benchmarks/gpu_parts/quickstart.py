"""j: the quickstart flow on this machine, then again with every output in its store."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator

from benchmarks.gpu_parts.jobs import ROOT
from benchmarks.gpu_parts.process import run_program
from benchmarks.gpu_parts.rows import Context, Row

NEEDED_S = 45.0  # on a GPU machine; a CPU takes minutes


def run(context: Context) -> Iterator[Row]:
    if importlib.util.find_spec("metaflow") is None:
        yield context.row("quickstart flow", note="left out: metaflow is not installed")
        return
    needed = NEEDED_S if context.on_gpu else 4 * NEEDED_S
    if context.left() < needed:
        yield context.row(
            "quickstart flow", note=f"left out: it takes about {needed:.0f} s, {context.left():.0f} are left"
        )
        return
    for name, key in (("quickstart flow", "quickstart_s"), ("again, with all in the store", "quickstart_again_s")):
        if (seconds := _timed(context)) is None:
            yield context.row(name, note="ended, for its time was over")
            return
        yield context.row(name, seconds, "s", key=key)


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
