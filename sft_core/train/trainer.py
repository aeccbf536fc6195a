"""TRL's SFTTrainer over a schedule of packs: exact loss over the global batch, whole checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import SequentialSampler
from trl import SFTTrainer

from sft_core.recipe.rank_strategies import STRATEGIES
from sft_core.store.digests import is_whole
from sft_core.train import checkpoints
from sft_core.train.callbacks import AtTrainBegin, StopRequest
from sft_core.train.collate import Batch, to_device
from sft_core.train.continuation import Continuation
from sft_core.train.finite import FiniteSteps, check_weights
from sft_core.train.first_rank import on_first_rank
from sft_core.train.flops import Flops
from sft_core.train.hooks import AnswerScorer, Pack
from sft_core.train.log_file import LogFile
from sft_core.train.loss import Forward, LossBySource, trained_losses, trained_token_nll
from sft_core.train.models.router import RouterLoss, router_config_kept
from sft_core.train.objectives.objective import Objective
from sft_core.train.online import OnlineSchedule, step_gain
from sft_core.train.probe import Isolation
from sft_core.train.row_losses import RowLosses
from sft_core.train.schedule import EMPTY
from sft_core.train.selection import EvaluateSelection, Selection, SelectionLosses
from sft_core.train.speed import batch_flops
from sft_core.train.speed_log import SpeedLog
from sft_core.train.strategy import check_engaged
from sft_core.train.tried_forward import TriedForward


class PackTrainer(SFTTrainer):
    """Minimises the objective's total divided by its amount, both over the global batch (all ranks and micro-batches).

    Checkpoints are staged in args.output_dir. `folder` holds complete checkpoints: the newest `keep`, and the best.
    write_model(model, weights, folder) writes a checkpoint that transformers loads; weights: all weights of the model,
    if this rank holds only a share of them.
    flops: for the logged speed, and for the cost of a roll-out.
    online: draws the packs during training; then train_dataset holds slots of its schedule instead of packs.
    of_class: probe.class_isolation's answer for the model's class. TriedForward tries the model itself before its first
    use, and rank 0 writes the answer to forward_log.
    name_rows: returns a text that names documents of the plan, for an error.
    router: the loss of a mixture of experts' router; coefficient x mean over the batch's tokens is added to the loss.
    """

    def __init__(
        self,
        *,
        objective: Objective,
        sources: list[str],
        strategy: str,
        folder: Path,
        keep: int,
        flops: Flops,
        selection: Selection | None,
        online: OnlineSchedule | None,
        of_class: Isolation | None,
        router: RouterLoss | None,
        forward_log: LogFile,
        write_model: Callable[[Any, dict[str, torch.Tensor] | None, Path], None],
        name_rows: Callable[[np.ndarray], str],
        **kwargs: Any,
    ):
        with router_config_kept(kwargs["model"].config.get_text_config()):
            super().__init__(**kwargs)
        model = self.accelerator.unwrap_model(self.model)
        self._forward = TriedForward(model, self.args, of_class=of_class, router=router, log=forward_log)
        self._objective, self._tokens_in_batch = objective, 0.0
        self.model_accepts_loss_kwargs = True  # else compute_loss gets no amount if the model's forward takes no kwargs
        self._sources = sources
        self._packs_a_forward = self.args.per_device_train_batch_size
        self._num_data_ranks = STRATEGIES[strategy].num_data_ranks(self.accelerator.num_processes)
        self._global_batch_size = self._packs_a_forward * self.args.gradient_accumulation_steps * self._num_data_ranks
        self._strategy, self._is_engaged = strategy, False  # check_engaged runs in the first forward
        self._folder, self._keep = folder, keep
        self._write_model = write_model
        self._stop = StopRequest(folder.parent)
        self.add_callback(self._stop)
        self._online = online
        if online is not None:  # before the evaluation, which asks it whether this step is the last
            online.measure_gains, online.measure_losses = self._measure_gains, self._measure_training_losses
            self.add_callback(online)
        self.selection, self._evaluation = selection, None
        self._keeps_best = selection is not None and selection.keep_best
        if selection is not None:
            self._evaluation = EvaluateSelection(
                selection,
                self._measure_selection,
                self.save_weights,
                is_over=lambda: online is not None and online.is_over,
            )
            self.add_callback(self._evaluation)
        self._finite = FiniteSteps(self.accelerator, name_rows)
        self._loss_by_source, self._speed = LossBySource(len(sources)), SpeedLog(flops, self.accelerator)
        self._flops = flops
        self.add_callback(AtTrainBegin(self._restore_running_sums))
        self._resumed_from: Path | None = None

    def train_from(self, checkpoint: Path | None) -> None:
        """Trains to the end of the schedule, from its start or from a checkpoint."""
        self._resumed_from = checkpoint
        step = 0 if checkpoint is None else checkpoints.step_of(checkpoint)
        parts = [part for part in (self._online, self._evaluation) if part is not None]
        if any([part.begin(step, writes=self.is_world_process_zero()) for part in parts]):  # a list: all of them begin
            # Training ended at this checkpoint, before the schedule's last step. Cut the data off there: while data
            # remains, the Trainer trains another step.
            self.args.max_steps = step
            self.train_dataset = self.train_dataset.select(range(step * self._global_batch_size))  # type: ignore
        answers = self.selection.answers if self.selection is not None else None
        with answers.ready(self.model) if answers is not None else contextlib.nullcontext():
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        assert self.train_dataset is not None
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]  # the schedule is the order

    def compute_loss(  # type: ignore[override]
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        assert num_items_in_batch is not None and not return_outputs
        if not self._is_engaged:
            check_engaged(self._strategy, self.accelerator, model)
            self._is_engaged = True
        batch, forward = inputs, self._forward.of(model)
        losses = trained_losses(model, batch, forward, num_forwards=self._num_forwards(batch, forward))
        self._loss_by_source.add(losses.nll_N, batch["source"])
        self._speed.count(batch)
        loss = self._objective.total(losses.nll_N, batch) / num_items_in_batch
        if losses.router is not None and forward.router is not None:
            loss = loss + forward.router.coefficient * losses.router / self._tokens_in_batch
        self._finite.add_loss(loss, losses.nll_N, batch)
        # DDP averages gradients over ranks. The loss is divided by a sum over all ranks, so multiply to undo the mean.
        return loss * self._num_data_ranks

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._finite.end_step(self.state.global_step + 1, norm)
        return norm

    def floating_point_ops(self, inputs: Batch) -> float:  # type: ignore[override]
        """FLOPs of one forward and backward. The Trainer's version loops over all parameters at each micro-batch."""
        return batch_flops(self._flops, inputs)

    def _prepare_inputs(self, inputs: Batch) -> Batch:  # type: ignore[override]
        # The Trainer's version would round the weights of turns to DeepSpeed's half precision.
        return to_device(inputs, self.args.device)

    def _num_forwards(self, batch: Batch, forward: Forward) -> int | None:
        """The largest number of documents on any rank, if each gets a forward and ranks share the weights; else None.

        Ranks that share weights wait for each other in each forward, so all must make equally many.
        """
        if not forward.alone or not STRATEGIES[self._strategy].shards_weights:
            return None
        num_documents = torch.tensor([len(batch["lengths"])], device=self.args.device)
        return int(self.accelerator.gather(num_documents).max())

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        if self._online is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        # The loader reads a batch ahead, before its packs are drawn. So it yields slots, and they become packs here.
        slots = [batch["slot"].tolist() for batch in itertools.islice(epoch_iterator, num_batches)]
        batches = [self._online.batch(of_forward) for of_forward in slots]
        return batches, self._get_num_items_in_batch(batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> torch.Tensor:
        """The objective's amount of the global batch; the Trainer's version counts labels.

        It is counted on the CPU. Ranks exchange their counts, so the host waits once a step; a single rank never waits.
        """
        amount = sum(self._objective.amount(batch) for batch in batch_samples)
        num_tokens = sum(int(batch["lengths"].sum()) for batch in batch_samples if len(batch["pack_sizes"]))
        # Exchange the request to stop as well: all ranks must stop after the same step.
        counts = torch.tensor([[amount, float(self._stop.is_asked()), num_tokens]], dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.gather(counts.to(device)).cpu()
        total, num_asked, num_tokens = counts.sum(dim=0).tolist()
        self._stop.is_agreed, self._tokens_in_batch = bool(num_asked), max(1.0, num_tokens)
        return torch.tensor(total or 1.0)  # a batch that trains nothing has loss 0

    def _measure(self, losses: SelectionLosses, *, count_correct: bool = False) -> RowLosses:
        self._finite.check()
        return losses.measure(
            self.model_wrapped,
            device=self.args.device,
            rank=self.accelerator.process_index,
            num_ranks=self.accelerator.num_processes,
            sum_over_ranks=self._sum_over_ranks,
            forward=self._forward.of(self.model_wrapped),
            count_correct=count_correct,
        )

    def _measure_training_losses(self) -> np.ndarray:
        """The loss per trained token of each document of the plan: shape (documents,)."""
        assert self._online is not None
        return self._measure(SelectionLosses(self._online.collator)).by_row

    def _measure_gains(self, packs: list[Pack]) -> np.ndarray:
        """The share by which one optimizer step on each pack lowers that pack's loss: shape (packs,).

        Each rank measures some of the packs, so each must hold all weights. Dropout is off: it would advance the random
        state of training.
        """
        assert self._online is not None
        self._finite.check()
        model: Any = self.accelerator.unwrap_model(self.model_wrapped)
        forward = self._forward.of(model)
        gains = torch.zeros(len(packs), dtype=torch.float64, device=self.args.device)
        model.eval()
        for number in range(self.accelerator.process_index, len(packs), self.accelerator.num_processes):
            batch = to_device(self._online.collator.of_packs([packs[number].tolist()]), self.args.device)

            def loss(batch: Batch = batch) -> torch.Tensor:
                with self.compute_loss_context_manager():
                    return trained_token_nll(model, batch, forward).mean()

            gains[number] = step_gain(self.optimizer, loss, max_grad_norm=self.args.max_grad_norm)
        model.train()
        return self._sum_over_ranks(gains).cpu().numpy()

    def _measure_selection(self) -> RowLosses:
        assert self.selection is not None
        answers = self.selection.answers
        row_losses = self._measure(self.selection.losses, count_correct=answers is not None)
        if answers is not None:
            row_losses = self._with_answers(answers, row_losses)
        losses = row_losses.by_source(self.selection.sources)
        by_source = {f"eval_selection_loss/{source}": loss for source, loss in losses.items()}
        should_log = self.control.should_log
        self.log({"eval_selection_loss": sum(losses.values()) / len(losses), **by_source})
        self.control.should_log = should_log  # `log` resets it; without it this step's training metrics are lost
        return row_losses

    def _with_answers(self, answers: AnswerScorer, losses: RowLosses) -> RowLosses:
        model: Any = self.model
        model.eval()
        scores, flops = answers.score(
            model,
            losses,
            rank=self.accelerator.process_index,
            num_ranks=self.accelerator.num_processes,
            sum_over_ranks=self._sum_over_ranks,
        )
        model.train()
        return dataclasses.replace(losses, answers=scores, answer_flops=flops)

    def flops(self) -> tuple[float, float]:
        """FLOPs of the training so far, and of its measurements (evaluations, gains), summed over all ranks."""
        evaluation = 0.0
        if self._evaluation is not None and self.selection is not None:
            forward = float(self._flops_of_packs(self.selection.losses.collator).sum()) / 3
            evaluation = self._evaluation.num_done * forward + self._evaluation.answer_flops
        if self._online is not None:
            training, measuring = self._online.flops(self.state.global_step)
            return training, evaluation + measuring
        done = np.array(self.train_dataset["pack"])[: self.state.global_step * self._global_batch_size]  # type: ignore[index]
        return float(self._flops_of_packs(self.data_collator)[done[done != EMPTY]].sum()), evaluation

    def _flops_of_packs(self, collator: Any) -> np.ndarray:
        plan = collator.plan
        return np.add.reduceat(self._flops.of_documents(plan.num_tokens, collator.num_trained), plan.offsets[:-1])

    def save_weights(self, folder: Path) -> None:
        """Writes the current weights to a folder, which is complete or absent. All ranks call it together."""
        self._check_finite()
        is_shared = STRATEGIES[self._strategy].shards_weights  # then all ranks gather the weights for rank 0
        weights = self.accelerator.get_state_dict(self.model_wrapped) if is_shared else None
        if self.accelerator.is_main_process:
            unfinished = folder.with_name(f".unfinished-{folder.name}")
            for stale in (unfinished, folder):
                shutil.rmtree(stale, ignore_errors=True)
            self._write_model(self.accelerator.unwrap_model(self.model), weights, unfinished)
            unfinished.rename(folder)
        self.accelerator.wait_for_everyone()

    def load_best(self) -> None:
        """Loads the weights of the step with the lowest selection loss. Raises RuntimeError if they are damaged."""
        step = self.state.best_global_step
        if not self._keeps_best or step == self.state.global_step:
            return
        best = self._folder / f"checkpoint-{step}"
        if not on_first_rank(lambda: is_whole(best)):
            raise RuntimeError(
                f"{best}: the checkpoint of the lowest selection loss is damaged or missing; train again from the start"
            )
        self.state.best_model_checkpoint = str(best)
        self._load_best_model()

    def _check_finite(self) -> None:
        """Raises NotFiniteError for a step so far, or for this rank's weights. All ranks call it together."""
        self._finite.check()
        model: Any = self.accelerator.unwrap_model(self.model_wrapped)
        check_weights(model.named_parameters(), f"the weights after step {self.state.global_step}")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self._finite.check()
            means, counts = self._loss_by_source.take(self._sum_over_ranks)
            logs |= self._speed.line(evaluation_s=self._evaluation.take_seconds() if self._evaluation else 0.0)
            logs |= {f"loss/{name}": mean for name, mean, n in zip(self._sources, means, counts, strict=True) if n}
        super().log(logs, start_time)

    def _sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._check_finite()
        # Skip SFTTrainer's version, which writes a model card for each checkpoint.
        super(SFTTrainer, self)._save_checkpoint(model, trial)
        continuation = self._continuation()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            staged = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            continuation.write(staged)
            checkpoints.save_logs(self._folder.parent / checkpoints.LOGS, staged)
            best = self.state.best_global_step if self._keeps_best else None
            checkpoints.publish(staged, self._folder, keep=self._keep, best=best)
        self.accelerator.wait_for_everyone()

    def _continuation(self) -> Continuation:
        of_rank = torch.cat([self._tr_loss.double().reshape(1), self._loss_by_source.sums.ravel()])
        by_rank = self.accelerator.gather(of_rank[None])
        return Continuation(
            strategy=self._strategy,
            num_ranks=self.accelerator.num_processes,
            logged=self._globalstep_last_logged,
            packs_a_forward=self._packs_a_forward,
            losses=by_rank[:, 0].tolist(),
            sums=by_rank[:, 1:].reshape(len(by_rank), 2, -1).tolist(),
        )

    def _restore_running_sums(self) -> None:
        """Restores the sums of the log's next line from the checkpoint that training resumes from."""
        if self._resumed_from is None:
            return
        written = Continuation.read(self._resumed_from)
        loss, sums = written.share(self.accelerator.process_index, self.accelerator.num_processes)
        self._tr_loss.fill_(loss)
        self._loss_by_source.go_on_from(torch.tensor(sums, dtype=torch.float64, device=self.args.device))
        self._globalstep_last_logged = written.logged
