"""Starts the training ranks, waits for them, and leaves no process behind.

On several nodes each node starts its own ranks: the first node builds the output, the others join its training.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_core.data.packing.over_long import windows_of
from sft_core.die_with_parent import STARTED_BY, die_with_parent
from sft_core.report.shown import shown
from sft_core.train.checkpoints import STOP, stop_request, worth_keeping
from sft_core.train.counts import TrainedCounts
from sft_core.train.job import TrainJob, TrainSpec, job_path, write_job
from sft_core.train.strategy import environment

if TYPE_CHECKING:
    from sft_core.recipe.sections import Runtime
    from sft_core.store.stage import Build, Json

log = logging.getLogger(__name__)
START = "start model"  # among the inputs of a build: the checkpoint of the phase before
TORCHRUN = "torchrun"  # torchrun's folder in an unfinished output
# What a training needs to go on, and the output does not have.
TEMPORARY = ("checkpoints", "staging", TORCHRUN, "trainer.lock", STOP, "error-rank*.txt", ".unfinished-*")
KEEP_S = 2.0  # between two checks for a new checkpoint
LOOK_S = 1.0  # between two checks of the files of another node
STARTED_WITHIN_S = 1800.0  # the first node may have to download its inputs
STORED_WITHIN_S = 7200.0  # and to upload its output


def build_trained(build: Build, *, job: TrainSpec, round: int) -> dict[str, Json]:
    """Trains in a separate process group, and writes model/ and logs/. Raises RuntimeError with the rank's error."""
    train_job = job_here(build, from_start(build, job), round)
    return launch(build, train_job, train_job)


def from_start(build: Build, spec: TrainSpec) -> TrainSpec:
    """The spec with the checkpoint of the phase before as its start model, where there is one."""
    if START not in build.inputs:
        return spec
    weights = str((build.inputs[START] / "model").resolve())
    return dataclasses.replace(spec, model=dataclasses.replace(spec.model, path=weights))


def job_here(build: Build, spec: TrainSpec, round: int) -> TrainJob:
    """The job of a spec, with the paths and the runtime of this build."""
    return TrainJob(
        spec=spec,
        round=round,
        out=build.out.resolve(),
        packs=build.inputs["packs"].resolve(),
        tokens=[token_folders(build.inputs, source) for source in spec.sources],
        selection_packs=build.inputs["selection"].resolve() if spec.selection is not None else None,
        runtime=build.runtime,
        num_threads=num_threads(build.runtime),
    )


def launch(build: Build, job: TrainJob, of_ranks: object) -> dict[str, Json]:
    """Runs the ranks of a job to their end, and returns the counts for the manifest.

    of_ranks: the job that the ranks read: `job`, or a job that contains it. Raises RuntimeError with the rank's error.
    """
    out, output = build.out, build.out / "logs" / "train.log"
    for stale in (*out.glob("error-rank*.txt"), stop_request(out)):
        stale.unlink(missing_ok=True)
    path = write_job(of_ranks, out)  # after the removal: ranks of other nodes start now, and may write errors
    with signals_ask_to_stop(out), kept_checkpoints(build):
        run_ranks(path, job.spec.rank_module, job.runtime, out, log=output)
    if job.spec.training.lora is not None:
        run(["-m", "sft_core.train.merge", str(path)], variables(out, num_threads=job.num_threads), out, log=output)
    events = [json.loads(line) for line in (out / "logs" / "log.jsonl").read_text().splitlines()]
    first, last = events[0], events[-1]
    counts = TrainedCounts(round=job.round, steps=last["of"], first_loss=first["loss"], last_loss=last["loss"])
    return counts.to_json()


def join_training(out: Path, runtime: Runtime, rank_module: str, is_done: Callable[[], bool]) -> None:
    """Runs the ranks of a node that is not the first. They join the ranks of the first node, which writes the output.

    out: where the first node builds, in a folder that all nodes see. rank_module: the job's. is_done: whether the
    output is whole. Raises FileNotFoundError when the first node writes no job, and RuntimeError with a failing rank's
    error.
    """
    job = job_path(out)
    if not comes_true(lambda: job.exists() or is_done(), STARTED_WITHIN_S):
        raise FileNotFoundError(
            f"{job}: not there after {STARTED_WITHIN_S:.0f} s. The first node writes it, so the nodes do not see the "
            "same folder: put runtime.store (SFT_CACHE if the store is a URL) on a file system that all nodes share"
        )
    if is_done():
        return
    with signals_ask_to_stop(out):
        run_ranks(job, rank_module, runtime, out, log=None)
    if not comes_true(is_done, STORED_WITHIN_S):
        raise RuntimeError(f"{out}: the ranks ended, and the first node did not store their output")


def comes_true(condition: Callable[[], bool], within_s: float) -> bool:
    """Waits for the condition. Returns False if it does not hold within the time."""
    end = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(LOOK_S)
    return True


def num_threads(runtime: Runtime) -> int:
    """CPU threads of a rank."""
    return runtime.num_threads or max(1, (os.cpu_count() or 1) // runtime.num_processes)


def token_folders(inputs: Mapping[str, Path], source: str) -> list[Path]:
    """The folders of a source's rows, in the order in which a plan numbers them: tokens, then windows if any."""
    return [inputs[name].resolve() for name in (source, windows_of(source)) if name in inputs]


@contextlib.contextmanager
def kept_checkpoints(build: Build) -> Iterator[None]:
    """Uploads complete checkpoints during training if the store is a URL, so that they outlive this machine."""
    if build.upload is None:
        yield
        return
    ended = threading.Event()

    def keep_newest() -> None:
        kept: set[Path] = set()
        while True:
            is_last = ended.wait(KEEP_S)  # before the check, so that it includes the ranks' last checkpoint
            for checkpoint in worth_keeping(build.out / "checkpoints"):
                if checkpoint not in kept:
                    try:
                        build.keep(checkpoint)
                        kept.add(checkpoint)
                    except OSError as error:
                        log.warning("checkpoint=%s was not uploaded: %s", checkpoint.name, error)
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
def signals_ask_to_stop(out: Path) -> Iterator[None]:
    """On SIGTERM (the machine is reclaimed) or Ctrl-C the ranks save a checkpoint and end; a retry resumes from it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return

    def ask(signum: int, frame: Any) -> None:
        if not stop_request(out).exists():
            stop_request(out).touch()
            # Not print: the signal may interrupt a print.
            os.write(1, b"asked to stop: the ranks save a checkpoint after this step, and end\n")

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def torchrun(runtime: Runtime, out: Path) -> list[str]:
    """The arguments of Python that start this node's ranks. `node_environment` sets which of how many nodes it is.

    Without a --log-dir torchrun makes a folder in the system's temporary one, and a kill leaves it there.
    """
    alone = [] if "PET_NNODES" in os.environ else ["--standalone"]
    logs = f"--log-dir={out.resolve() / TORCHRUN}"
    ranks = f"--nproc_per_node={runtime.num_processes}"
    return ["-m", "torch.distributed.run", *alone, ranks, logs, "--signals_to_handle=SIGINT"]


def node_environment(*, node: int, num_nodes: int, address: str, port: int) -> dict[str, str]:
    """The environment that tells torchrun (torch 2.13) its node: each option is a variable PET_<OPTION>.

    address, port: of the first node, to which all ranks connect.
    """
    options = {"nnodes": num_nodes, "node_rank": node, "master_addr": address, "master_port": port}
    return {f"PET_{name.upper()}": str(value) for name, value in options.items()}


def variables(out: Path, *, num_threads: int, distributed: str | None = None) -> dict[str, str]:
    """The environment of a rank. Without `distributed`: of a process that trains without other ranks."""
    return {
        "TENSORBOARD_LOGGING_DIR": str((out / "logs" / "tensorboard").resolve()),
        **os.environ,
        STARTED_BY: str(os.getpid()),
        "OMP_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait slow a shared machine down
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "TQDM_DISABLE": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning:torch.distributed.c10d_logger",  # DeepSpeed causes one warning a call
        **(environment(distributed) if distributed is not None else {}),
    }


def run_ranks(job: Path, rank_module: str, runtime: Runtime, out: Path, *, log: Path | None) -> None:
    """Runs this node's ranks by torchrun. Raises RuntimeError with the error of the rank that failed first."""
    settings = variables(out, num_threads=num_threads(runtime), distributed=runtime.distributed)
    run([*torchrun(runtime, out), "-m", rank_module, str(job)], settings, out, log=log)


def run(arguments: list[str], variables: dict[str, str], out: Path, *, log: Path | None) -> None:
    """Runs Python in a separate process group. Its output goes to this process's output and to the log.

    out: the folder where ranks write their errors. Raises RuntimeError with the error of the rank that failed first.
    """
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=variables,
        start_new_session=True,
        preexec_fn=functools.partial(_begin, os.getpid()),
    )
    tail: collections.deque[str] = collections.deque(maxlen=40)
    try:
        assert process.stdout is not None
        with (log or Path(os.devnull)).open("a") as file:
            for line in process.stdout:
                file.write(line)
                file.flush()
                print(shown(line), end="", flush=True)
                tail.append(line)
        code = process.wait()
    except BaseException:
        _end(process)
        raise
    if code:
        # The first error: the other ranks' errors only say that they lost the connection to that rank.
        errors = sorted(out.glob("error-rank*.txt"), key=lambda path: path.stat().st_mtime_ns)
        first = killed_ranks("".join(tail)) or (errors[0].read_text() if errors else "".join(tail))
        raise RuntimeError(f"training failed (exit code {code}):\n{first}")


def _begin(launcher: int) -> None:
    """In the new process. SIGTERM to all processes, as systemd sends it, is for the launcher, not for torchrun."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent(launcher)


def killed_ranks(output: str) -> str:
    """Which rank a signal ended first, by the end of torchrun's output (torch 2.13); empty if none.

    A killed rank writes no error, and the others only lose their connection to it. torchrun ends those: by SIGTERM, and
    by SIGKILL where they do not heed it.
    """
    match = _ENDED_BY.search(output.rpartition("Root Cause (first observed failure):")[2])
    if match is None or (number := signal.Signals(int(match[2]))) == signal.SIGTERM:
        return ""
    line = f"rank {match[1]} was ended by {number.name}"
    if number == signal.SIGKILL:
        line += "; where nobody killed it, the machine ran out of memory: the kernel's log (dmesg) says so"
    return line


_ENDED_BY = re.compile(r"^ +rank +: (\d+) .*\n +exitcode +: -(\d+) ", re.MULTILINE)


def _end(process: subprocess.Popen[str]) -> None:
    """Ends torchrun; the kernel ends its ranks with it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
