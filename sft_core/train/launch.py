"""Start the training ranks, wait for them, and leave none behind."""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_core.data.over_long import windows_of
from sft_core.lifetime import STARTED_BY, die_with_parent
from sft_core.train.accelerator import has_gpu
from sft_core.train.checkpoints import numbered, stop_request
from sft_core.train.strategy import environment

if TYPE_CHECKING:
    from sft_core.recipe import Runtime
    from sft_core.store import Build

log = logging.getLogger(__name__)
KEEP_S = 2.0  # between looks for a new checkpoint


def build_trained(build: Build, *, job: dict[str, Any], round: int) -> dict[str, Any]:
    """Trains in a process group of its own and leaves model/ and logs/. Raises RuntimeError with the rank's error."""
    runtime = build.runtime
    num_threads = runtime.num_threads or max(1, (os.cpu_count() or 1) // runtime.num_processes)
    (build.out / "logs").mkdir(exist_ok=True)
    for stale in (*build.out.glob("error-rank*.txt"), *build.out.glob(stop_request(build.out).name)):
        stale.unlink()
    settings = {
        **job,
        "out": str(build.out.resolve()),
        "packs": str(build.inputs["packs"].resolve()),
        "tokens": [token_folders(build.inputs, source) for source in job["sources"]],
        "runtime": {**runtime.model_dump(mode="json"), "num_threads": num_threads},
    }
    path = build.out / "logs" / "job.json"
    path.write_text(json.dumps(settings, indent=1))
    with sigterm_asks_to_stop(build.out), kept_checkpoints(build):
        run(path, [*torchrun(runtime), "-m", "sft_core.train.main"], settings["runtime"], build.out)
    if job["training"]["lora"] is not None:
        run(path, ["-m", "sft_core.train.merge"], {**settings["runtime"], "distributed": None}, build.out)
    for leftover in ("checkpoints", "staging"):
        shutil.rmtree(build.out / leftover, ignore_errors=True)
    for leftover in ("trainer.lock", stop_request(build.out).name):
        (build.out / leftover).unlink(missing_ok=True)
    events = [json.loads(line) for line in (build.out / "logs" / "log.jsonl").read_text().splitlines()]
    return {"round": round, "steps": events[-1]["of"], "first_loss": events[0]["loss"], "last_loss": events[-1]["loss"]}


def token_folders(inputs: Mapping[str, Path], source: str) -> list[str]:
    """Where the source's rows are, in the order in which a plan numbers them: its tokens, and its windows if any."""
    return [str(inputs[name].resolve()) for name in (source, windows_of(source)) if name in inputs]


@contextlib.contextmanager
def kept_checkpoints(build: Build) -> Iterator[None]:
    """Whole checkpoints go where the loss of this machine does not reach them, while the ranks train on."""
    if build.upload is None:
        yield
        return
    ended = threading.Event()

    def keep_newest() -> None:
        kept: Path | None = None
        while True:
            is_last = ended.wait(KEEP_S)  # before the look: what stands there when the ranks have ended is kept too
            newest = numbered(build.out / "checkpoints")[-1:]
            if newest and newest[0] != kept:
                try:
                    build.keep(newest[0])
                    kept = newest[0]
                except OSError as error:
                    log.warning("checkpoint=%s could not be kept: %s", newest[0].name, error)
            if is_last:
                return

    thread = threading.Thread(target=keep_newest)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def sigterm_asks_to_stop(out: Path) -> Iterator[None]:
    """On SIGTERM (a machine that is taken back) the ranks save a checkpoint and end; a retry goes on from there."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return

    def ask(signum: int, frame: Any) -> None:
        stop_request(out).touch()
        os.write(1, b"SIGTERM: the ranks save a checkpoint after this step, and end\n")  # print may be at work

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def torchrun(runtime: Runtime) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={runtime.num_processes}"]


def variables(runtime: dict[str, Any], out: Path) -> dict[str, str]:
    """The environment of a rank. `distributed` None: of a process that knows no other ranks."""
    return {
        "TENSORBOARD_LOGGING_DIR": str((out / "logs" / "tensorboard").resolve()),
        **os.environ,
        STARTED_BY: str(os.getpid()),
        "OMP_NUM_THREADS": str(runtime["num_threads"]),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait cost a shared machine most of its speed
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "TQDM_DISABLE": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning:torch.distributed.c10d_logger",  # one for each call of DeepSpeed's
        **(environment(runtime["distributed"]) if runtime["distributed"] else {}),
        **({} if has_gpu() else {"DS_ACCELERATOR": "cpu"}),
    }


def run(job: Path, command: list[str], runtime: dict[str, Any], out: Path) -> None:
    """Runs Python in a process group of its own; its output goes to logs/train.log and to this process's own.

    Raises RuntimeError with the error of the rank that failed first.
    """
    process = subprocess.Popen(
        [sys.executable, *command, str(job)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=variables(runtime, out),
        start_new_session=True,
        preexec_fn=functools.partial(die_with_parent, os.getpid()),
    )
    tail: collections.deque[str] = collections.deque(maxlen=40)
    try:
        assert process.stdout is not None
        with (out / "logs" / "train.log").open("a") as file:
            for line in process.stdout:
                file.write(line)
                file.flush()
                print(line, end="", flush=True)
                tail.append(line)
        code = process.wait()
    except BaseException:
        _end(process)
        raise
    if code:
        # The first to fail: the others then tell only of a lost connection to it.
        errors = sorted(out.glob("error-rank*.txt"), key=lambda path: path.stat().st_mtime_ns)
        raise RuntimeError(f"training failed (exit code {code}):\n{errors[0].read_text() if errors else ''.join(tail)}")


def _end(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    except ProcessLookupError:
        pass
