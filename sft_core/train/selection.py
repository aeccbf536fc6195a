"""Losses on the selection split during training: a curve for each source, and the step with the lowest mean."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft_core.data.packing.plan import PackPlan
from sft_core.train.collate import PackCollator, to_device
from sft_core.train.hooks import AnswerScorer, Watch
from sft_core.train.log_file import LogFile, read_events
from sft_core.train.loss import Forward, trained_token_logits, trained_token_nll
from sft_core.train.row_losses import RowLosses
from sft_core.train.schedule import EMPTY


def evaluation_steps(num_steps: int, steps_per_epoch: int, every_epochs: float) -> list[int]:
    """The optimizer steps after which to evaluate: 0, each `every_epochs`, and the last; each step once.

    >>> evaluation_steps(10, 8, 0.5)
    [0, 4, 8, 10]
    """
    count = math.floor(num_steps / (steps_per_epoch * every_epochs))
    steps = [round(number * every_epochs * steps_per_epoch) for number in range(count + 1)]
    return sorted({*(step for step in steps if step <= num_steps), num_steps})


class SelectionLosses:
    """Measures the losses of all selection rows. Each rank runs some of the packs; all ranks get the result."""

    def __init__(self, collator: PackCollator):
        self.collator = collator

    @property
    def plan(self) -> PackPlan:
        return self.collator.plan

    def measure(
        self,
        model: torch.nn.Module,
        *,
        device: torch.device,
        rank: int,
        num_ranks: int,
        sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
        forward: Forward,
        count_correct: bool = False,
    ) -> RowLosses:
        """The losses of all rows. Leaves the model in training mode.

        count_correct: also count the trained tokens to which the model gives the highest likelihood.
        """
        plan = self.plan
        sums = torch.zeros(3, len(plan.row), dtype=torch.float64, device=device)  # of loss, of tokens, of correct ones
        model.eval()
        try:
            with torch.no_grad():
                for pack in self._packs_of(rank, num_ranks):
                    batch = to_device(self.collator([{"pack": pack}]), device)
                    correct_N = torch.zeros(())
                    if count_correct:
                        logits_NV = trained_token_logits(model, batch, forward)
                        nll_N = F.cross_entropy(logits_NV, batch["target_ids"], reduction="none")
                        correct_N = (logits_NV.argmax(dim=-1) == batch["target_ids"]).double()
                    else:
                        nll_N = trained_token_nll(model, batch, forward)
                    if pack != EMPTY:
                        document_N = batch["document"] + int(plan.offsets[pack])
                        sums[0].index_add_(0, document_N, nll_N.double())
                        sums[1].index_add_(0, document_N, torch.ones_like(nll_N, dtype=torch.float64))
                        if count_correct:
                            sums[2].index_add_(0, document_N, correct_N)
        finally:
            model.train()
        nll, num_trained, num_correct = sum_over_ranks(sums).cpu().numpy()
        return RowLosses(nll, num_trained, plan.source.astype(np.int64), num_correct if count_correct else None)

    def _packs_of(self, rank: int, num_ranks: int) -> Iterator[int]:
        """A rank's packs, filled up with EMPTY to equally many on every rank.

        Ranks that share parameters wait for each other in each forward pass.
        """
        num_packs = len(self.plan)
        for first in range(0, num_packs, num_ranks):
            yield first + rank if first + rank < num_packs else EMPTY


@dataclasses.dataclass(frozen=True)
class Selection:
    """The evaluations during training, and the steps after which they run."""

    losses: SelectionLosses
    sources: list[str]
    steps: list[int]
    log: Path
    keep_best: bool  # keep the checkpoint of the lowest loss
    watch: Watch | None = None
    answers: AnswerScorer | None = None


class EvaluateSelection(TrainerCallback):
    """Evaluates at the selection's steps, logs the losses, and with keep_best saves the best step's checkpoint.

    The best step has the lowest mean over sources, each source weighted equally; of equal steps the first. Step 0 is
    never the best.
    """

    def __init__(
        self,
        selection: Selection,
        measure: Callable[[], RowLosses],
        save_weights: Callable[[Path], None],
        is_over: Callable[[], bool],
    ):
        self._selection, self._measure, self._save_weights = selection, measure, save_weights
        self._is_over = is_over  # whether training ends at this step, before the last of the plan
        self._log = LogFile(selection.log)
        self._seconds = 0.0  # of evaluation since the log's last line; throughput leaves them out
        self.num_done = 0
        self.answer_flops = 0.0

    def begin(self, step: int, *, writes: bool) -> bool:
        """Resumes from the log up to `step`. Returns True if the watch has decided that training ends there.

        writes: this is rank 0, which truncates the log after `step`.
        """
        before = step if step > 0 else -1  # a training from the start evaluates step 0 again
        past = [event for event in read_events(self._selection.log) if event["step"] <= before]
        self.num_done = len(past)
        self.answer_flops = sum(event.get("answer_flops", 0.0) for event in past)
        if writes:
            self._log.rewind(before)
        if (watch := self._selection.watch) is None:
            return False
        watch.begin(past)
        return bool(past) and watch.is_decided

    def take_seconds(self) -> float:
        """Evaluation seconds since the last call; the logged throughput leaves them out."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 0:
            self._evaluate(state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._evaluate(state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._selection.watch is not None and state.is_world_process_zero:
            self._selection.watch.saved()

    def _evaluate(self, state: TrainerState, control: TrainerControl) -> None:
        if state.global_step not in self._selection.steps and not self._is_over():
            return
        self.num_done += 1
        started = time.monotonic()
        row_losses = self._measure()
        losses = row_losses.by_source(self._selection.sources)
        mean = sum(losses.values()) / len(losses)
        if state.global_step > 0 and (state.best_metric is None or mean < state.best_metric):
            state.best_metric, state.best_global_step = mean, state.global_step
            control.should_save |= self._selection.keep_best
        self.answer_flops += row_losses.answer_flops
        event = {"step": state.global_step, "of": state.max_steps, "loss": mean, "losses": losses}
        if row_losses.answers is not None:
            event["answer_flops"] = row_losses.answer_flops
        if (watch := self._selection.watch) is not None:
            event |= watch.see(state.global_step, row_losses, self._save_weights)
            control.should_training_stop |= watch.is_decided
        self._seconds += time.monotonic() - started
        if state.is_world_process_zero:
            self._log.add(event)
            print(f"step={state.global_step}/{state.max_steps} selection_loss={mean:.4g}", flush=True)
