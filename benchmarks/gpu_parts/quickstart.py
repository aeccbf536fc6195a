"""j: the quickstart flow on this machine, then again with every output in its store."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Iterator

from benchmarks.gpu_parts.jobs import ROOT
from benchmarks.gpu_parts.process import environment_of_others
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
    command = [sys.executable, str(ROOT / "flows" / "sft_flow.py"), "run"]
    settings = {"METAFLOW_USER": "benchmark", "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(context.folder)}
    begun = time.monotonic()
    with (context.folder / "flow.txt").open("w+") as output:
        process = subprocess.Popen(
            [*command, "--set", f"runtime.store={context.folder / 'store'}"],
            cwd=ROOT,
            env=environment_of_others() | settings,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait(timeout=max(1.0, context.left() - 2))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None
        if code:
            output.seek(0)
            text = output.read()
            print(text)
            raise RuntimeError(f"the flow failed: {' '.join(text.split())[-300:]}")
    return time.monotonic() - begun
