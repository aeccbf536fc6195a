"""f: a training that is killed after step 7 goes on from its checkpoint of step 5 as one that was not interrupted.

Kernels that add in any order (flash attention's backward pass) give other bits in each run: then two unbroken runs
differ as well, and deterministic kernels must make the broken one equal to the bit.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.gpu_parts.jobs import Work
from benchmarks.gpu_parts.process import Ahead, alone_of_its_group
from benchmarks.gpu_parts.rows import Case, Context, Row, cases
from benchmarks.gpu_parts.shapes import config_of, documents, tokens
from benchmarks.gpu_parts.sides import apart, losses_of, our_trainer, weights_drawn_on
from sft_core.train.checkpoints import numbered, step_of
from sft_core.train.job import TrainJob, write_job
from sft_core.train.main import train, trained

STEPS, SAVED_AT, KILLED_AT = 10, 5, 7
PERIOD_S = 120.0  # the longest that a killed training may take to its end
DETERMINISTIC = {"full_determinism": True}


def run(context: Context) -> Iterator[Row]:
    log = context.folder / "killed.log"
    if context.on_gpu:  # before anything is computed: cuBLAS reads it once
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    command, group = (
        ["--task", "killed_training", "--device", context.device],
        {} if context.on_gpu else alone_of_its_group(),
    )
    processes = [Ahead(command, log=log, environment=group) for _ in range(2 if context.on_gpu else 1)]
    try:
        yield from cases(context, listed(context, processes))
    finally:
        for process in processes:
            process.end()
        if log.exists():
            print(log.read_text())  # into this part's own


def listed(context: Context, processes: Sequence[Ahead] = ()) -> list[Case]:
    """processes: those that are killed, for the first case and the last one."""
    found: dict[str, bool] = {}
    return [
        Case(
            "a kill at step 7, resumed from 5",
            20,
            lambda: kernels_as_they_are(context, processes[0], found),
            is_core=True,
        ),
        Case("a save of 3 B", 28, lambda: save_rows(context), is_core=True),
        Case("the same by deterministic kernels", 12, lambda: deterministic_rows(context, processes[-1], found)),
    ]


def _work(context: Context, extra: dict[str, Any]) -> Work:
    size = tokens(2048, context.device)
    return Work(
        config_of("30m", context.device),
        documents(size, size // 3),
        steps=STEPS,
        packs_a_step=2,
        training={"extra": extra, "learning_rate": 1e-3},
        runtime={"save_steps": SAVED_AT, "logging_steps": 1, "keep_checkpoints": 2},
    )


def unbroken(context: Context, name: str, extra: dict[str, Any]) -> Path:
    """The folder of a training from its start to its end."""
    work, folder = _work(context, extra), context.folder / name
    job = work.write(folder)
    _train(context, job)
    return job.out


def _train(context: Context, job: TrainJob) -> None:
    assert job.spec.model.config is not None
    with apart(job.spec.model.config), weights_drawn_on(context.device), our_trainer(saves_s=[]):
        train(job)


def broken(context: Context, name: str, extra: dict[str, Any], process: Ahead) -> Path:
    """The folder of one that was killed in another process, and ended here."""
    job = _work(context, extra).write(context.folder / name)
    out, path = job.out, str(write_job(job, job.out))
    try:
        process.wait_until_ready(max(1.0, context.left()))
        told = list(process.go({"job": path, "step": KILLED_AT}, min(PERIOD_S, max(1.0, context.left()))))
    except RuntimeError:
        told = []
    assert not told and len(losses_of(out)) == KILLED_AT - 1, f"not killed at {KILLED_AT}: {losses_of(out)}, {told}"
    left = [step_of(checkpoint) for checkpoint in numbered(out / "checkpoints")]
    assert left == [SAVED_AT], f"checkpoints of {left}"
    _train(context, job)
    return out


def difference(one: Path, other: Path) -> tuple[float, str]:
    """The largest of all weights', relative to the tensor's norm, and its name."""
    found, expected = (load_file(out / "model" / "model.safetensors") for out in (one, other))
    assert found.keys() == expected.keys()
    by_name = {
        name: 0.0
        if torch.equal(found[name], expected[name])
        else float((found[name].double() - expected[name].double()).norm() / expected[name].double().norm())
        for name in found
    }
    worst = max(by_name, key=lambda name: by_name[name])
    return by_name[worst], worst


def kernels_as_they_are(context: Context, process: Ahead, found: dict[str, bool]) -> Iterator[Row]:
    whole, resumed = unbroken(context, "whole", {}), broken(context, "broken", {}, process)
    differs, worst = difference(resumed, whole)
    found["identical"] = differs == 0
    name = "a kill at step 7, resumed from 5"
    losses = losses_of(resumed) == losses_of(whole)
    if differs == 0:
        yield context.row(
            name, 0, "", f"bit-identical; the logs' losses {'too' if losses else 'are not'}", passed=losses
        )
        return
    if not context.on_gpu:
        yield context.row(name, differs, "of norm", f"not bit-identical: {worst}", passed=False)
        return
    again, of = difference(unbroken(context, "again", {}), whole)
    note = f"{worst}; two unbroken runs differ by {again:.2g} ({of}): kernels that add in any order"
    if again == 0:
        note = f"{worst}; two unbroken runs are bit-identical, so the resume is at fault"
    yield context.row(name, differs, "of norm", note, passed=again > 0 and differs < 10 * again)


def deterministic_rows(context: Context, process: Ahead, found: dict[str, bool]) -> Iterator[Row]:
    name = "the same by deterministic kernels"
    if found.get("identical"):
        yield context.row(name, note="not needed: it is bit-identical without")
        return
    if not context.on_gpu:
        yield context.row(name, note="on a GPU only")
        return
    whole, resumed = unbroken(context, "whole-d", DETERMINISTIC), broken(context, "broken-d", DETERMINISTIC, process)
    differs, worst = difference(resumed, whole)
    note = "bit-identical" if differs == 0 else worst
    yield context.row(name, differs, "of norm", note, passed=differs == 0)


def save_rows(context: Context) -> Iterator[Row]:
    """On the disk of this machine's temporary files."""
    size = tokens(8192, context.device)
    work = Work(
        config_of("3b", context.device),
        [size],
        steps=2,
        checkpointing=True,
        runtime={"save_steps": 2, "logging_steps": 1},
    )
    job = work.write(context.folder / "save")
    saves_s: list[float] = []
    _room_for_one(context, work)
    with apart(work.config), weights_drawn_on(context.device), our_trainer(saves_s=saves_s, asks_room=False):
        trained(job)
    (folder,) = numbered(job.out / "checkpoints")
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    note = f"{written / 1e9:.1f} GB at {written / 1e9 / saves_s[0]:.2f} GB/s"
    yield context.row("a save of 3 B stops training", saves_s[0], "s", note, key="3b.save_stops_s")


def _room_for_one(context: Context, work: Work) -> None:
    needed, free = 12 * work.num_parameters() * 1.05, shutil.disk_usage(context.folder).free
    if free < needed:
        raise RuntimeError(f"a checkpoint takes {needed / 1e9:.0f} GB, and {free / 1e9:.0f} are free; set TMPDIR")
