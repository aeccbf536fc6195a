"""One training rank: `python -m torch.distributed.run ... -m sft_core.train.main JOB.json`.

Reads shards and a plan, writes a checkpoint folder; knows neither the store nor the flow.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sft_core.die_with_parent import die_with_parent
from sft_core.report.shown import log_as_text
from sft_core.train.checkpoints import check_room, discard_staged, stop_request
from sft_core.train.job import TrainJob, read_job

if TYPE_CHECKING:
    from sft_core.data.packing.plan import PackPlan
    from sft_core.train.hooks import AnswerScorer, Sampler, Watch
    from sft_core.train.trainer import PackTrainer


class Stopped(RuntimeError):
    """Training ended before its last step on request (a SIGTERM)."""


@contextlib.contextmanager
def as_rank(out: Path) -> Iterator[None]:
    """Around a rank's training: its logging, a lock on the folder, and a file with its error for the launcher."""
    rank = int(os.environ.get("RANK", "0"))
    signal.signal(signal.SIGTERM, functools.partial(_terminated, out))
    log_as_text(logging.INFO if rank == 0 else logging.ERROR)
    try:
        with _alone(out) if rank == 0 else contextlib.nullcontext():
            yield
    except BaseException:
        # The launcher shows this file instead of torchrun's and the other ranks' output.
        (out / f"error-rank{rank}.txt").write_text(traceback.format_exc())
        raise


def _terminated(out: Path, number: int, frame: object) -> None:
    """On SIGTERM. torchrun sends it where another rank failed; else all processes got it, and the launcher stops."""
    if any(out.glob("error-rank*.txt")):
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Holds the folder's lock. Raises RuntimeError if another trainer runs in this folder."""
    from filelock import FileLock, Timeout

    lock = FileLock(out / "trainer.lock")
    try:
        lock.acquire(timeout=60)
    except Timeout:
        raise RuntimeError(f"another trainer runs in {out}; end it first") from None
    try:
        yield
    finally:
        lock.release()


def main(job_path: Path) -> None:
    die_with_parent()
    job = read_job(TrainJob, job_path)
    with as_rank(job.out):
        train(job)


def train(job: TrainJob) -> None:
    """Trains to the end of the schedule, from the newest complete checkpoint if any, and writes model/."""
    trainer = trained(job)
    trainer.load_best()
    trainer.save_weights(job.out / "model")
    trainer.accelerator.end_training()


def trained(
    job: TrainJob,
    *,
    watch: Callable[[int], Watch] | None = None,
    sampler: Callable[[PackPlan, int], Sampler | None] | None = None,
    answers: Callable[..., AnswerScorer | None] | None = None,
) -> PackTrainer:
    """The trainer after its last step.

    watch(steps_per_epoch): returns the Watch of the selection losses. sampler(packs, num_steps): returns the Sampler
    that draws the packs; None: the schedule is fixed from the start. answers(selection_rows, tokenizer=,
    flops_a_token=): returns the AnswerScorer; None: answers are not scored. Raises Stopped on a request to stop.
    """
    import torch

    from sft_core.train.assemble import (
        bytes_on_disk,
        load_start,
        make_trainer,
        online_schedule,
        plan_training,
        selection_of,
    )
    from sft_core.train.first_rank import is_first_rank
    from sft_core.train.strategy import prepare_deepspeed

    prepare_deepspeed()
    torch.set_num_threads(job.num_threads)
    plan = plan_training(job)
    if is_first_rank():
        check_room(job.out, bytes_on_disk(plan.shape.num_parameters(), job))
        discard_staged(job.out / "staging")
    drawing = sampler(plan.collator.plan, len(plan.schedule)) if sampler is not None else None
    online = online_schedule(job, plan, drawing) if drawing is not None else None
    start = load_start(job, plan)
    trainer = make_trainer(job, plan, start, online, selection_of(job, plan, start, watch, answers))
    trainer.train_from(start.checkpoint)
    step, num_steps = trainer.state.global_step, len(plan.schedule)
    if stop_request(job.out).exists() and step < num_steps:
        raise Stopped(
            f"stopped at step {step} of {num_steps}, as asked; its checkpoint is complete: a retry resumes from it"
        )
    return trainer


if __name__ == "__main__":
    main(Path(sys.argv[1]))
