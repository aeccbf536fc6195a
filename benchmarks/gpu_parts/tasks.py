"""What parts want done in processes of their own: `benchmarks/gpu.py --task NAME`. Each takes an order, gives JSON."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.gpu_parts.meter import Meter
from benchmarks.gpu_parts.sides import apart, losses_of, our_trainer, weights_drawn_on
from sft_core.train.job import TrainJob, read_job
from sft_core.train.main import train, trained


class Killed(TrainerCallback):
    """Ends this process after a step as a machine that is taken away does: no handler runs."""

    def __init__(self, step: int):
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_training(device: str, *, job: str, step: int) -> dict[str, Any]:
    """job: its file."""
    with weights_drawn_on(device), our_trainer(callbacks=[Killed(step)], saves_s=[]):
        train(read_job(TrainJob, Path(job)))
    return {"is_over": True}  # it was not killed


def strategy_steps(device: str, *, job: str, warm: int, timed: int) -> dict[str, Any]:
    """A rank under the strategy that the environment names: its losses, seconds a step and memory. job: its file."""
    meter, train_job = Meter(device, warm=warm, timed=timed), read_job(TrainJob, Path(job))
    assert train_job.spec.model.config is not None
    with apart(train_job.spec.model.config, meter), our_trainer(meter):
        trainer = trained(train_job)
        dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in trainer.model.parameters()}
        del trainer
    measured = meter.result()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return {
        "losses": losses_of(train_job.out),
        "step_s": measured.step_s,
        "peak_gib": measured.peak_gib,
        "weights": ", ".join(sorted(dtypes)),
    }
