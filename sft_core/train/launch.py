"""Start the training ranks, wait for them, and leave none behind.

On several nodes each starts its own: the first one builds the output, the others train along.
"""

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
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_core.data.over_long import windows_of
from sft_core.lifetime import STARTED_BY, die_with_parent
from sft_core.train.checkpoints import numbered, step_of, stop_request, worth_keeping
from sft_core.train.log_file import read_events
from sft_core.train.strategy import environment

if TYPE_CHECKING:
    from sft_core.sections import Runtime
    from sft_core.store import Build

log = logging.getLogger(__name__)
START = "start model"  # among a build's inputs: the checkpoint of the phase before
KEEP_S = 2.0  # between looks for a new checkpoint
LOOK_S = 1.0  # between looks for what another node does
SEEN_WITHIN_S = 1800.0  # the first node may have to download its inputs
STORED_WITHIN_S = 7200.0  # and to upload what came out


def build_trained(build: Build, *, job: dict[str, Any], round: int) -> dict[str, Any]:
    """Trains in a process group of its own and leaves model/ and logs/. Raises RuntimeError with the rank's error."""
    runtime = build.runtime
    (build.out / "logs").mkdir(exist_ok=True)
    for stale in (*build.out.glob("error-rank*.txt"), *build.out.glob(stop_request(build.out).name)):
        stale.unlink()
    settings = {
        **job,
        "round": round,
        "out": str(build.out.resolve()),
        "packs": str(build.inputs["packs"].resolve()),
        "tokens": [token_folders(build.inputs, source) for source in job["sources"]],
        **(
            {"selection": {**job["selection"], "packs": str(build.inputs["selection"].resolve())}}
            if "selection" in job
            else {}
        ),
        "runtime": {**runtime.model_dump(mode="json"), "num_threads": num_threads(runtime)},
    }
    if START in build.inputs:
        weights = {"path": str((build.inputs[START] / "model").resolve())}
        job = {**job, "model": job["model"] | weights}
        settings["model"] = job["model"]
    if "rollout" in job:
        settings |= _rollout(build, job, round)
    path, output = build.out / "logs" / "job.json", build.out / "logs" / "train.log"
    path.write_text(json.dumps(settings, indent=1))
    with sigterm_asks_to_stop(build.out), kept_checkpoints(build):
        run(path, [*torchrun(runtime), "-m", rank_module(settings)], settings["runtime"], build.out, log=output)
    if job["training"]["lora"] is not None:
        run(path, ["-m", "sft_core.train.merge"], {**settings["runtime"], "distributed": None}, build.out, log=output)
    for leftover in ("checkpoints", "staging"):
        shutil.rmtree(build.out / leftover, ignore_errors=True)
    for leftover in ("trainer.lock", stop_request(build.out).name):
        (build.out / leftover).unlink(missing_ok=True)
    events = [json.loads(line) for line in (build.out / "logs" / "log.jsonl").read_text().splitlines()]
    return {"round": round, "steps": events[-1]["of"], "first_loss": events[0]["loss"], "last_loss": events[-1]["loss"]}


def rank_module(job: dict[str, Any]) -> str:
    """What a rank runs. A roll-out's ranks know the search, which stands above training."""
    return "sft_core.search.main" if "rollout" in job else "sft_core.train.main"


_CONVERSATIONS = "conversations:"


def _rollout(build: Build, job: dict[str, Any], round: int) -> dict[str, Any]:
    """What a roll-out's job says besides: where the ones before it are, and the weights that it starts from."""
    before = [str(build.inputs[f"round:{number}"].resolve()) for number in range(round)]
    wanted = {name.removeprefix(_CONVERSATIONS): path for name, path in build.inputs.items() if _CONVERSATIONS in name}
    conversations = {task: str(path.resolve()) for task, path in wanted.items()}
    changed: dict[str, Any] = {"rollout": {**job["rollout"], "before": before, "conversations": conversations}}
    if (start := job["rollout"]["start"]) is not None:
        weights = evaluation_folder(Path(before[start["round"]]), start["evaluation"])
        changed["model"] = {**job["model"], "path": str(weights), "revision": None, "config": None}
    drop_checkpoints_without_weights(build.out)
    return changed


def evaluation_folder(out: Path, evaluation: int) -> Path:
    """Where a roll-out keeps the weights of one of its evaluations."""
    return out / "evaluations" / f"{evaluation:03}"


def drop_checkpoints_without_weights(out: Path) -> None:
    """A roll-out goes on from no checkpoint whose kept evaluations are gone, as on another machine: it begins anew."""
    newest = numbered(out / "checkpoints")[-1:]
    events = read_events(out / "logs" / "selection.jsonl") if newest else []
    known = [event for event in events if event["step"] <= step_of(newest[0])]
    if known and not all(evaluation_folder(out, evaluation).is_dir() for evaluation in known[-1]["kept"]):
        log.warning("checkpoint=%s the weights of earlier evaluations are gone: begins anew", newest[0].name)
        shutil.rmtree(out / "checkpoints")


def train_along(out: Path, runtime: Runtime, is_done: Callable[[], bool]) -> None:
    """What a node does that is not the first: its ranks join the first one's, which writes what comes out.

    out: where the first node builds, in a folder that all nodes see. is_done: whether the output is whole.
    Raises FileNotFoundError when nothing is seen of the first node, and RuntimeError with a failing rank's error.
    """
    job = out / "logs" / "job.json"
    if not comes_true(lambda: job.exists() or is_done(), SEEN_WITHIN_S):
        raise FileNotFoundError(
            f"{job}: not there after {SEEN_WITHIN_S:.0f} s; the first node writes it, so the folder is not the same "
            "on all nodes: runtime.store (of a URL: SFT_CACHE) has to be on a file system that they share"
        )
    if is_done():
        return
    settings = {**runtime.model_dump(mode="json"), "num_threads": num_threads(runtime)}
    with sigterm_asks_to_stop(out):
        module = rank_module(json.loads(job.read_text()))
        run(job, [*torchrun(runtime), "-m", module], settings, out, log=None)
    if not comes_true(is_done, STORED_WITHIN_S):
        raise RuntimeError(f"{out}: the ranks ended, and the first node did not store what came out")


def comes_true(condition: Callable[[], bool], within_s: float) -> bool:
    """Waits for the condition; False where it does not hold in time."""
    end = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(LOOK_S)
    return True


def num_threads(runtime: Runtime) -> int:
    """CPU threads of a rank."""
    return runtime.num_threads or max(1, (os.cpu_count() or 1) // runtime.num_processes)


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
        kept: set[Path] = set()
        while True:
            is_last = ended.wait(KEEP_S)  # before the look: what stands there when the ranks have ended is kept too
            for checkpoint in worth_keeping(build.out / "checkpoints"):
                if checkpoint not in kept:
                    try:
                        build.keep(checkpoint)
                        kept.add(checkpoint)
                    except OSError as error:
                        log.warning("checkpoint=%s could not be kept: %s", checkpoint.name, error)
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
    """Of this node's ranks. Which of how many nodes it is stands in the environment (see `among_nodes`)."""
    alone = [] if "PET_NNODES" in os.environ else ["--standalone"]
    return ["-m", "torch.distributed.run", *alone, f"--nproc_per_node={runtime.num_processes}"]


def among_nodes(*, node: int, num_nodes: int, address: str, port: int) -> dict[str, str]:
    """The environment by which torchrun (torch 2.13) knows its node: each option's name after PET_.

    address, port: of the first node, where all ranks meet.
    """
    options = {"nnodes": num_nodes, "node_rank": node, "master_addr": address, "master_port": port}
    return {f"PET_{name.upper()}": str(value) for name, value in options.items()}


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
    }


def run(job: Path, command: list[str], runtime: dict[str, Any], out: Path, *, log: Path | None) -> None:
    """Runs Python in a process group of its own; its output goes to this process's own, and to the log.

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
        with (log or Path(os.devnull)).open("a") as file:
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
