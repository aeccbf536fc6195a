"""Training on packs that a sampler draws during training. The sampler learns after each block of optimizer steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft_core.train.collate import Batch, PackCollator
from sft_core.train.hooks import Pack, Sampler
from sft_core.train.log_file import LogFile, read_events


class OnlineSchedule(TrainerCallback):
    """The packs that the sampler has drawn for each step so far.

    Each measurement is a line of the log. A resumed training replays the lines up to its checkpoint's step, so it draws
    the same packs. costs: FLOPs of each document, shape (documents,).
    """

    def __init__(
        self,
        sampler: Sampler,
        collator: PackCollator,
        log: Path,
        *,
        num_steps: int,
        global_batch_size: int,
        costs: np.ndarray,
    ):
        self._sampler, self.collator, self._path, self._log = sampler, collator, log, LogFile(log)
        self._num_steps, self._batch_size, self._costs = num_steps, global_batch_size, costs
        self._steps: list[list[Pack]] = []
        self._measuring_flops = 0.0
        self.is_over = False  # whether the sampler draws nothing after the steps so far
        # The trainer sets both, because it has the model: the gain of one step on each pack; the loss of each document.
        self.measure_gains: Callable[[list[Pack]], np.ndarray] | None = None
        self.measure_losses: Callable[[], np.ndarray] | None = None

    def batch(self, slots: list[int]) -> Batch:
        """The packs in slots of the schedule: slot j of step i is i * global_batch_size + j."""
        return self.collator.of_packs(self._pack(slot).tolist() for slot in slots)

    def _pack(self, slot: int) -> Pack:
        step, place = divmod(slot, self._batch_size)
        packs = self._steps[step] if step < len(self._steps) else []  # the trainer reads ahead, also past the end
        return packs[place] if place < len(packs) else np.empty(0, np.int64)

    def flops(self, step: int) -> tuple[float, float]:
        """FLOPs of the training up to a step, and of the sampler's measurements."""
        packs = [pack for packs in self._steps[:step] for pack in packs]
        return float(sum(self._costs[pack].sum() for pack in packs)), self._measuring_flops

    def begin(self, step: int, *, writes: bool) -> bool:
        """Replays the sampler up to `step`. Returns True if it has no batches left.

        writes: this is rank 0, which truncates the log after `step`.
        """
        past = [event for event in read_events(self._path) if event["step"] <= step]
        if writes:
            self._log.rewind(step)
        self._draw()
        for event in past:
            self._probe()
            self._sampler.learn(np.array(event["measured"]))
            self._draw()
        return self.is_over and step == len(self._steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        step = state.global_step
        if step < len(self._steps) or step >= self._num_steps:
            return
        assert self.measure_gains is not None and self.measure_losses is not None
        probes = self._probe()
        measured = self.measure_losses() if probes is None else self.measure_gains(probes)
        self._sampler.learn(measured)
        event = {"step": step, "shares": self._sampler.shares(), "measured": measured.tolist()}
        if state.is_world_process_zero:
            self._log.add(event)
        self._draw()
        control.should_training_stop |= self.is_over

    def _draw(self) -> None:
        block = self._sampler.next_block()
        self.is_over = block is None
        self._steps += block or []

    def _probe(self) -> list[Pack] | None:
        probes = self._sampler.probes()
        # self._costs count a forward and backward, three forward passes. A gain takes one forward pass more.
        documents = np.arange(len(self._costs)) if probes is None else np.concatenate(probes)
        self._measuring_flops += float(self._costs[documents].sum()) * (1 / 3 if probes is None else 4 / 3)
        return probes


def step_gain(wrapped: Any, loss: Callable[[], torch.Tensor], *, max_grad_norm: float) -> float:
    """The share by which one optimizer step on a loss lowers that loss. The step is undone.

    wrapped: accelerate's optimizer of the parameters on which the loss depends.
    """
    optimizer: torch.optim.Optimizer = wrapped.optimizer  # accelerate's wrapper steps only when accumulation ends
    with undone(optimizer):
        before = loss()
        before.backward()
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(_parameters(optimizer), max_grad_norm)
        optimizer.step()
        with torch.no_grad():
            after = loss()
    return float((before.detach() - after) / (before.detach() + 1e-8))


@contextlib.contextmanager
def undone(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Undoes the optimizer's steps inside: restores weights and optimizer state bit for bit."""
    parameters = _parameters(optimizer)
    weights = [parameter.detach().clone() for parameter in parameters]
    states = [
        {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}
        for state in (optimizer.state.get(parameter, {}) for parameter in parameters)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, weight, state in zip(parameters, weights, states, strict=True):
                parameter.copy_(weight)
                parameter.grad = None
                if state:
                    optimizer.state[parameter] = state
                else:
                    optimizer.state.pop(parameter, None)


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
