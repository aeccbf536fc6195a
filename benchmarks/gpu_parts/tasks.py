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
from sft_core.train.main import train, trained


class Killed(TrainerCallback):
    """Ends this process after a step as a machine that is taken away does: no handler runs."""

    def __init__(self, step: int):
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_training(device: str, *, job: dict[str, Any], step: int) -> dict[str, Any]:
    with weights_drawn_on(device), our_trainer(callbacks=[Killed(step)], saves_s=[]):
        train(job, Path(job["out"]))
    return {"is_over": True}  # it was not killed


def strategy_steps(device: str, *, job: dict[str, Any], warm: int, timed: int) -> dict[str, Any]:
    """A rank under the strategy that the environment names: its losses, seconds a step and memory."""
    meter = Meter(device, warm=warm, timed=timed)
    with apart(job["model"]["config"], meter), our_trainer(meter):
        trainer = trained(job, Path(job["out"]))
        dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in trainer.model.parameters()}
        del trainer
    measured = meter.result()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return {
        "losses": losses_of(Path(job["out"])),
        "step_s": measured.step_s,
        "peak_gib": measured.peak_gib,
        "weights": ", ".join(sorted(dtypes)),
    }
