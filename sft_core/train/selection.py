"""Losses on the selection split while training goes on: a curve for each source, and which checkpoint was best."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft_core.train.collate import PackCollator
from sft_core.train.log_file import LogFile
from sft_core.train.loss import LossBySource, trained_token_nll
from sft_core.train.schedule import EMPTY


def evaluation_steps(num_steps: int, steps_per_epoch: float, every_epochs: float) -> list[int]:
    """After which optimizer steps to evaluate: 0, each `every_epochs`, and the last; each step once.

    >>> evaluation_steps(10, 8, 0.5)
    [0, 4, 8, 10]
    """
    count = math.floor(num_steps / (steps_per_epoch * every_epochs))
    steps = [round(number * every_epochs * steps_per_epoch) for number in range(count + 1)]
    return sorted({*(step for step in steps if step <= num_steps), num_steps})


class SelectionLosses:
    """The mean loss of each source's selection rows. Ranks share the packs; all get the result."""

    def __init__(self, collator: PackCollator, sources: list[str]):
        self._collator, self._sources = collator, sources

    def measure(
        self,
        model: torch.nn.Module,
        *,
        device: torch.device,
        rank: int,
        num_ranks: int,
        sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
        fused_lm_head: bool,
    ) -> dict[str, float]:
        """Loss by source. The model is in training mode again when this returns."""
        losses = LossBySource(len(self._sources))
        model.eval()
        try:
            with torch.no_grad():
                for pack in self._packs_of(rank, num_ranks):
                    batch = {name: values.to(device) for name, values in self._collator([{"pack": pack}]).items()}
                    nll_N, targets_N = trained_token_nll(model, batch, fused_lm_head=fused_lm_head)
                    losses.add(nll_N, batch["source"][0, targets_N])
        finally:
            model.train()
        means, _ = losses.take(sum_over_ranks)
        return dict(zip(self._sources, means, strict=True))

    def _packs_of(self, rank: int, num_ranks: int) -> Iterator[int]:
        """Every rank gets as many: one that shares its parameters waits for the others at each forward pass."""
        num_packs = len(self._collator.plan)
        for first in range(0, num_packs, num_ranks):
            yield first + rank if first + rank < num_packs else EMPTY


class EvaluateSelection(TrainerCallback):
    """Measures at the given steps, writes them down, and has the best step's checkpoint saved if that is wanted.

    The best is that of the lowest mean over sources, each counting the same; of equals the first, and never step 0.
    """

    def __init__(self, measure: Callable[[], dict[str, float]], steps: list[int], log: Path, *, save_best: bool):
        self._measure, self._steps, self._save_best = measure, set(steps), save_best
        self._log = LogFile(log)
        self.seconds = 0.0  # spent on it since somebody looked

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self._log.rewind(state.global_step)
        if state.global_step == 0:
            self._evaluate(state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._evaluate(state, control)

    def _evaluate(self, state: TrainerState, control: TrainerControl) -> None:
        if state.global_step not in self._steps:
            return
        started = time.monotonic()
        losses = self._measure()
        mean = sum(losses.values()) / len(losses)
        if state.global_step > 0 and (state.best_metric is None or mean < state.best_metric):
            state.best_metric, state.best_global_step = mean, state.global_step
            control.should_save |= self._save_best
        self.seconds += time.monotonic() - started
        if state.is_world_process_zero:
            self._log.add({"step": state.global_step, "of": state.max_steps, "loss": mean, "losses": losses})
            print(f"step={state.global_step}/{state.max_steps} selection_loss={mean:.4g}", flush=True)
