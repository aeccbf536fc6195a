"""Callbacks of the Trainer: a function at the start of training, a request to stop, and the lines of the log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft_core.train.checkpoints import stop_request
from sft_core.train.log_file import LogFile

PRINTED = ("loss", "learning_rate", "grad_norm", "tokens_per_s", "trained_tokens_per_s", "mfu", "memory_gib")


class AtTrainBegin(TrainerCallback):
    """Calls a function after the Trainer has set its sums to zero, before the first step."""

    def __init__(self, function: Callable[[], None]):
        self._function = function

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._function()


class StopRequest(TrainerCallback):
    """Saves a checkpoint and stops after the step in which a rank saw the launcher's request (a SIGTERM)."""

    def __init__(self, out: Path):
        self._path = stop_request(out)
        self.is_agreed = False

    def is_asked(self) -> bool:
        return self._path.exists()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.is_agreed:
            control.should_save = control.should_training_stop = True


class LogEvents(TrainerCallback):
    """Writes the Trainer's training metrics to a file, and prints a short line. Rank 0 only."""

    def __init__(self, path: Path):
        self._log = LogFile(path)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self._log.rewind(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_log |= (
            state.global_step >= state.max_steps
        )  # else steps after the last full interval get no line

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if state.is_world_process_zero and "loss" in logs:
            self._log.add({"step": state.global_step, "of": state.max_steps, **logs})
            values = " ".join(f"{name}={float(logs[name]):.4g}" for name in PRINTED if name in logs)
            print(f"step={state.global_step}/{state.max_steps} {values}", flush=True)
