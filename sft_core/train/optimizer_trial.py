"""The training section as the Trainer will read it: SFTConfig, optimizer and schedule, made and stepped on a number."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, Trainer, TrainingArguments
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from sft_core.recipe.wording import nearest
from sft_core.train.arguments import gpu_arguments, training_arguments

if TYPE_CHECKING:
    from trl import SFTConfig

    from sft_core.recipe.sections import Runtime, Training

_STEPS = 1000  # of a training whose packs are not counted yet
_FIRST_STEPS = 3
_OF_TRAINER = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")  # the other settings are a recipe's


class OneNumber(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, 1))  # a matrix: some optimizers take no others


class _OptimizerAlone(Trainer):
    """The Trainer's optimizer and schedule for a model, without the rest of a Trainer and its accelerator."""

    def __init__(self, model: torch.nn.Module, args: SFTConfig):
        self.model, self.args = model, args
        self.optimizer = self.lr_scheduler = self.optimizer_cls_and_kwargs = None


def try_optimizer(training: Training, runtime: Runtime, skeleton: Any, staging: Path, *, here: bool) -> list[str]:
    """Warnings about what cannot be tried here. Raises ValueError, in the recipe's words, for what cannot train.

    skeleton: the model without weights, for optimizers that choose among its modules. staging: an output_dir; nothing
    is written. here: this machine trains.
    """
    num_steps = training.max_steps or _STEPS
    _check_settings(training)
    arguments = _arguments(training, runtime, num_steps, staging, here=here)
    if arguments.optim_target_modules:
        _make(_OptimizerAlone(skeleton, arguments), training, "optimizer")
        return [f"training.extra.optim: {_optim(arguments)} is tried without a step, since it wants real weights"]
    model = OneNumber()
    trainer = _OptimizerAlone(model, arguments)
    _make(trainer, training, "optimizer")
    _make(trainer, training, "scheduler", num_steps)
    return _step_through(trainer, training, num_steps)


def _check_settings(training: Training) -> None:
    """Raises ValueError for settings that the scheduler does not have; transformers overlooks a constant one's."""
    kind = training.lr_scheduler_type
    make: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(kind)]
    known = {*inspect.signature(make).parameters}.difference(_OF_TRAINER)
    for name in training.lr_scheduler_kwargs:
        if name not in known:
            hint = nearest(name, known) if known else ", which has none"
            raise ValueError(f"training.lr_scheduler_kwargs.{name}: no setting of the scheduler {kind}{hint}")


def _arguments(training: Training, runtime: Runtime, num_steps: int, staging: Path, *, here: bool) -> SFTConfig:
    """SFTConfig as training has it, without trackers, and without what belongs to a GPU that is elsewhere."""
    elsewhere = () if here or torch.cuda.is_available() else gpu_arguments((8, 0))
    extra = {name: value for name, value in training.extra.items() if name not in elsewhere}
    free = training.model_copy(update={"use_liger_kernel": False, "extra": extra})
    runtime = runtime.model_copy(update={"report_to": ()})
    try:
        with _group_of_one():
            return training_arguments(
                free, runtime, num_steps=num_steps, num_data_ranks=runtime.num_data_ranks, staging=staging
            )
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        settings = f" with training.extra {training.extra}" if training.extra else ""
        raise ValueError(f"training: SFTConfig refuses the section{settings}: {error}") from None


@contextlib.contextmanager
def _group_of_one() -> Iterator[None]:
    """A process group of this process, without sockets: on a CPU, SFTConfig asks the ranks' group for its size."""
    if torch.distributed.is_initialized():
        yield
        return
    of_transformers = logging.getLogger(TrainingArguments.__module__)
    level = of_transformers.level
    of_transformers.setLevel(logging.ERROR)  # it warns of a group without a launcher
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        of_transformers.setLevel(level)


def _make(trainer: _OptimizerAlone, training: Training, part: str, num_steps: int = 0) -> None:
    try:
        if part == "optimizer":
            trainer.create_optimizer()
        else:
            trainer.create_scheduler(num_steps)
    except Exception as error:  # an optimizer's library may raise any error
        raise ValueError(f"{_keys_of(part, training)}; {error}") from None


def _keys_of(part: str, training: Training) -> str:
    """The recipe's keys of the optimizer or the scheduler, with what they say."""
    if part == "scheduler":
        kwargs = training.lr_scheduler_kwargs
        return f"training.lr_scheduler_kwargs: found {kwargs} for the scheduler {training.lr_scheduler_type}"
    settings = {name: value for name, value in training.extra.items() if name.startswith(("adam", "optim"))}
    if not settings:
        return "training: its optimizer cannot be made"
    return ", ".join(f"training.extra.{name}: found {value!r}" for name, value in settings.items())


def _step_through(trainer: _OptimizerAlone, training: Training, num_steps: int) -> list[str]:
    """The first steps, the middle and the last one. Raises ValueError for numbers that no training can use."""
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    assert optimizer is not None and scheduler is not None and isinstance(trainer.model, OneNumber)
    steps = sorted({*range(min(_FIRST_STEPS, num_steps)), num_steps // 2, num_steps - 1})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of steps in another order than in a training
        for step in steps:
            if isinstance(scheduler, LambdaLR) and step:
                scheduler.last_epoch = step - 1
                scheduler.step()
            rates = [float(group["lr"]) for group in optimizer.param_groups]
            _check_rates(rates, step, training)
            trainer.model.weight.grad = torch.full((1, 1), 0.5)
            try:
                optimizer.step()
            except Exception as error:
                if type(optimizer).__module__.startswith(("torch.", "transformers.")):
                    raise ValueError(f"{_keys_of('optimizer', training)}; {error}") from None
                return [f"training.extra.optim: {_optim(trainer.args)} cannot step on this machine's CPU ({error})"]
            if not trainer.model.weight.isfinite().all():
                raise ValueError(
                    f"{_keys_of('optimizer', training)}; step {step + 1} makes weights that are not finite"
                )
    return []


def _check_rates(rates: list[float], step: int, training: Training) -> None:
    for rate in rates:
        if not math.isfinite(rate) or not 0 <= rate <= training.learning_rate * (1 + 1e-6):
            raise ValueError(
                f"{_keys_of('scheduler', training)}; the learning rate is {rate:g} at step {step + 1}, and it lies "
                f"between 0 and training.learning_rate, {training.learning_rate:g}, which is the highest one"
            )


def _optim(arguments: Any) -> str:
    return str(getattr(arguments.optim, "value", arguments.optim))
