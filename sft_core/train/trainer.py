"""TRL's SFTTrainer over a schedule of packs: exact loss over the global batch, whole checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from sft_core.digests import is_whole
from sft_core.rank_strategies import STRATEGIES
from sft_core.train import checkpoints
from sft_core.train.collate import Batch, to_device
from sft_core.train.continuation import Continuation
from sft_core.train.first_rank import on_first_rank
from sft_core.train.flops import Flops
from sft_core.train.head import add_fused_head, takes_fused_head, wants_fused_head
from sft_core.train.log_file import LogFile
from sft_core.train.loss import Forward, LossBySource, trained_losses, trained_token_nll
from sft_core.train.online import OnlineSchedule, Pack, step_gain
from sft_core.train.probe import Isolation, settle
from sft_core.train.router import RouterLoss
from sft_core.train.schedule import EMPTY
from sft_core.train.selection import AnswerScorer, EvaluateSelection, RowLosses, Selection, SelectionLosses
from sft_core.train.speed import batch_flops, peak_flops_per_s, peak_memory_gib
from sft_core.train.strategy import check_engaged


class PackTrainer(SFTTrainer):
    """The objective is L = -1/W * sum of w * log p over the trained tokens of the global batch (all ranks, all
    accumulated micro-batches), where W is the sum of their weights w, so that neither ranks nor accumulation change
    the result. A token's weight is its turn's, 1 unless the data says otherwise: then W is the number of tokens.

    args.output_dir is where checkpoints are staged; whole ones are in `folder`, the newest `keep` of them and the best.
    write_model(model, weights, folder) makes a checkpoint of it that transformers loads; weights are all of the model's
    where this rank holds but a share of them.
    flops: for the speed that is logged, and for what a search tells of its cost.
    online: what is trained is drawn while it goes on; train_dataset's packs are slots of it then.
    of_class: what probe.class_isolation knows of its class; the model itself is tried before its first use.
    router: the loss of a mixture of experts' router, coefficient x mean over the batch's tokens, beside L.
    tell: writes down how the model is run, on the first rank.
    """

    def __init__(
        self,
        *,
        sources: list[str],
        strategy: str,
        folder: Path,
        keep: int,
        flops: Flops,
        selection: Selection | None,
        online: OnlineSchedule | None,
        of_class: Isolation | None,
        router: RouterLoss | None,
        tell: Callable[[dict[str, Any]], None],
        write_model: Callable[[Any, dict[str, Any] | None, Path], None],
        **kwargs: Any,
    ):
        with _config_kept(kwargs["model"].config.get_text_config()):
            super().__init__(**kwargs)
        own: Any = self.accelerator.unwrap_model(self.model)
        own = own.get_base_model() if hasattr(own, "get_base_model") else own  # of PEFT's
        self._may_fuse_head = wants_fused_head(self.args.device) and takes_fused_head(own)
        if self._may_fuse_head:
            add_fused_head(own)
        self._attention = own.config._attn_implementation
        on_cpu, half = self.args.device.type == "cpu", self.args.bf16 or self.args.fp16
        self._is_exact = on_cpu and not half and own.dtype == torch.float32  # a GPU's fp32 products are TF32's
        self._of_class, self._router, self._tell = of_class, router, tell
        self._forward: Forward | None = None  # until the model is tried
        self._tokens_in_batch = 0.0
        self.model_accepts_loss_kwargs = True  # the count comes to compute_loss, whatever the model's forward takes
        self._sources = sources
        self._packs_a_forward = self.args.per_device_train_batch_size
        self._num_data_ranks = STRATEGIES[strategy].num_data_ranks(self.accelerator.num_processes)
        self._global_batch_size = self._packs_a_forward * self.args.gradient_accumulation_steps * self._num_data_ranks
        self._strategy, self._is_engaged = strategy, False  # until it is seen at work
        self._folder, self._keep = folder, keep
        self._write_model = write_model
        self._stop = StopRequest(folder.parent)
        self.add_callback(self._stop)
        self._online = online
        if online is not None:  # before the evaluation, which is told of the last step
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
        self._loss_by_source = LossBySource(len(sources))
        self._flops, self._flops_done = flops, 0.0
        self._tokens_seen = self._trained_tokens_seen = 0
        self._last_log = time.monotonic()
        self.add_callback(AtTrainBegin(self._go_on))
        self._resumed_from: Path | None = None

    def train_from(self, checkpoint: Path | None) -> None:
        """To the end of the schedule, from its start or from a checkpoint."""
        self._resumed_from = checkpoint
        step = 0 if checkpoint is None else checkpoints.step_of(checkpoint)
        ended = [
            part.begin(step, writes=self.is_world_process_zero()) for part in (self._online, self._evaluation) if part
        ]
        if any(ended):
            # It was over there, before its last step. The Trainer trains nothing only where no data is left either.
            self.args.max_steps = step
            self.train_dataset = self.train_dataset.select(range(step * self._global_batch_size))  # type: ignore
        answers = self.selection.answers if self.selection is not None else None
        with answers.ready(self.model) if answers is not None else contextlib.nullcontext():
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        assert self.train_dataset is not None
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]  # the schedule is the order

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        assert num_items_in_batch is not None and not return_outputs
        if not self._is_engaged:
            check_engaged(self._strategy, self.accelerator, model)
            self._is_engaged = True
        batch, forward = cast(Batch, inputs), self._how_to_run(model)
        losses = trained_losses(model, batch, forward, num_forwards=self._num_forwards(batch, forward))
        self._loss_by_source.add(losses.nll_N, batch["source"])
        self._tokens_seen += int(batch["lengths"].sum())
        self._trained_tokens_seen += int(batch["num_targets"].sum())
        self._flops_done += self.floating_point_ops(inputs)
        loss = (losses.nll_N * batch["weights"]).sum() / num_items_in_batch
        if losses.router is not None and forward.router is not None:
            loss = loss + forward.router.coefficient * losses.router / self._tokens_in_batch
        # DDP averages over ranks, and the batch's sums are over all of them: the product restores the sum.
        return loss * self._num_data_ranks

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:  # type: ignore[override]
        """Of one forward and backward. The Trainer's own goes through all parameters at each micro-batch."""
        return batch_flops(self._flops, inputs)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # The Trainer's own would round the weights of turns to DeepSpeed's half precision.
        return cast("dict[str, Any]", to_device(cast(Batch, inputs), self.args.device))

    def _how_to_run(self, model: Any) -> Forward:
        """Tried on the model itself, on all ranks, before its first use; told in the log and to `tell`."""
        if self._forward is None:
            self._forward, isolation = settle(
                model,
                self._of_class,
                attention=self._attention,
                device=self.args.device,
                exact=self._is_exact,
                may_fuse_head=self._may_fuse_head,
                router=self._router,
            )
            if self.is_world_process_zero():
                self._tell(
                    {
                        "documents": "alone" if self._forward.alone else "together",
                        "packs_a_forward": self._packs_a_forward,
                        "fused_head": self._forward.fused_head,
                        **dataclasses.asdict(isolation),
                    }
                )
        return self._forward

    def _num_forwards(self, batch: Batch, forward: Forward) -> int | None:
        """Of all ranks the most, where each document is a forward and a rank waits in each for the others' weights."""
        if not forward.alone or not STRATEGIES[self._strategy].shards_weights:
            return None
        own = torch.tensor([len(batch["lengths"])], device=self.args.device)
        return int(self.accelerator.gather(own).max())

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        if self._online is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        # The loader looks a batch ahead, so it hands out slots: what is in them is known only now.
        slots = [batch["slot"].tolist() for batch in itertools.islice(epoch_iterator, num_batches)]
        batches = [self._online.batch(of_forward) for of_forward in slots]
        return batches, self._get_num_items_in_batch(batches, device)

    def _measure(self, losses: SelectionLosses, *, count_correct: bool = False) -> RowLosses:
        return losses.measure(
            self.model_wrapped,
            device=self.args.device,
            rank=self.accelerator.process_index,
            num_ranks=self.accelerator.num_processes,
            sum_over_ranks=self._sum_over_ranks,
            forward=self._how_to_run(self.model_wrapped),
            count_correct=count_correct,
        )

    def _measure_training_losses(self) -> np.ndarray:
        """Of each document of the plan, a trained token: shape (documents,)."""
        assert self._online is not None
        return self._measure(SelectionLosses(self._online.collator)).by_row

    def _measure_gains(self, packs: list[Pack]) -> np.ndarray:
        """By how much of itself one optimizer step on a pack lowers the pack's loss: shape (packs,).

        Ranks share the packs, which whole weights on every rank allow. Without dropout, so that nothing is drawn.
        """
        assert self._online is not None
        model: Any = self.accelerator.unwrap_model(self.model_wrapped)
        forward = self._how_to_run(model)
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
        found = self._measure(self.selection.losses, count_correct=answers is not None)
        if answers is not None:
            found = self._with_answers(answers, found)
        losses = found.by_source(self.selection.sources)
        by_source = {f"eval_selection_loss/{source}": loss for source, loss in losses.items()}
        should_log = self.control.should_log  # what training logs at this step; logging takes the wish for done
        self.log({"eval_selection_loss": sum(losses.values()) / len(losses), **by_source})
        self.control.should_log = should_log
        return found

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
        """Of the training so far, and of what was measured while it went on, on all ranks together."""
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
        """Writes the model of now to a folder that is whole or absent. On all ranks together."""
        is_shared = STRATEGIES[self._strategy].shards_weights  # then all ranks gather the weights, for the first
        weights = self.accelerator.get_state_dict(self.model_wrapped) if is_shared else None
        if self.accelerator.is_main_process:
            unfinished = folder.with_name(f".unfinished-{folder.name}")
            for left in (unfinished, folder):
                shutil.rmtree(left, ignore_errors=True)
            self._write_model(self.accelerator.unwrap_model(self.model), weights, unfinished)
            unfinished.rename(folder)
        self.accelerator.wait_for_everyone()

    def load_best(self) -> None:
        """Takes the weights of the step with the lowest selection loss. Raises RuntimeError when they are damaged."""
        step = self.state.best_global_step
        if not self._keeps_best or step == self.state.global_step:
            return
        best = self._folder / f"checkpoint-{step}"
        if not on_first_rank(lambda: is_whole(best)):
            raise RuntimeError(f"{best}: the checkpoint of the lowest selection loss is damaged or gone; train anew")
        self.state.best_model_checkpoint = str(best)
        self._load_best_model()

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> torch.Tensor:
        """The sum of the trained tokens' weights over the global batch: what the Trainer counts, with weights.

        Counted on the CPU. Ranks exchange their counts, for which the host waits once a step; one rank never waits.
        """
        weight = sum(batch["weight"] for batch in batch_samples)
        num_tokens = sum(int(batch["lengths"].sum()) for batch in batch_samples if len(batch["pack_sizes"]))
        # Whether to stop goes along: the ranks must agree on the step after which they do.
        own = torch.tensor([[weight, float(self._stop.is_asked()), num_tokens]], dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            own = self.accelerator.gather(own.to(device)).cpu()
        total, num_asked, num_tokens = own.sum(dim=0).tolist()
        self._stop.is_agreed, self._tokens_in_batch = bool(num_asked), max(1.0, num_tokens)
        return torch.tensor(total or 1.0)  # a batch that trains nothing has loss 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            means, counts = self._loss_by_source.take(self._sum_over_ranks)
            seconds = time.monotonic() - self._last_log
            logs["seconds"] = round(seconds, 3)  # since the last event, evaluation included
            if self._evaluation is not None:
                seconds, self._evaluation.seconds = seconds - self._evaluation.seconds, 0.0
            seen = [float(self._tokens_seen), float(self._trained_tokens_seen), self._flops_done]  # by this process
            own = torch.tensor(seen, dtype=torch.float64, device=self.args.device)
            tokens, trained_tokens, flops = self._sum_over_ranks(own).tolist()
            self._tokens_seen, self._trained_tokens_seen, self._flops_done = 0, 0, 0.0
            self._last_log = time.monotonic()
            flops_per_s = flops / seconds / self.accelerator.num_processes
            logs["tflops_per_s"] = float(f"{flops_per_s / 1e12:.4g}")  # of a rank
            if peak := peak_flops_per_s(self.args.device):
                logs["mfu"] = round(flops_per_s / peak, 4)
            memory = torch.tensor([peak_memory_gib(self.args.device)], dtype=torch.float64, device=self.args.device)
            logs["memory_gib"] = round(self.accelerator.gather(memory).max().item(), 3)
            logs["tokens_per_s"] = round(tokens / seconds, 1)
            logs["trained_tokens_per_s"] = round(trained_tokens / seconds, 1)
            logs |= {f"loss/{name}": mean for name, mean, n in zip(self._sources, means, counts, strict=True) if n}
        super().log(logs, start_time)

    def _sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Past SFTTrainer's own, which writes a model card for each checkpoint.
        super(SFTTrainer, self)._save_checkpoint(model, trial)
        continuation = self._continuation()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            staged = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            continuation.write(staged)
            best = self.state.best_global_step if self._keeps_best else None
            checkpoints.publish(staged, self._folder, keep=self._keep, best=best)
        self.accelerator.wait_for_everyone()

    def _continuation(self) -> Continuation:
        own = torch.cat([self._tr_loss.double().reshape(1), self._loss_by_source.sums.ravel()])
        by_rank = self.accelerator.gather(own[None])
        return Continuation(
            strategy=self._strategy,
            num_ranks=self.accelerator.num_processes,
            logged=self._globalstep_last_logged,
            packs_a_forward=self._packs_a_forward,
            losses=by_rank[:, 0].tolist(),
            sums=by_rank[:, 1:].reshape(len(by_rank), 2, -1).tolist(),
        )

    def _go_on(self) -> None:
        if self._resumed_from is None:
            return
        written = Continuation.read(self._resumed_from)
        loss, sums = written.share(self.accelerator.process_index, self.accelerator.num_processes)
        self._tr_loss.fill_(loss)
        self._loss_by_source.go_on_from(torch.tensor(sums, dtype=torch.float64, device=self.args.device))
        self._globalstep_last_logged = written.logged


class AtTrainBegin(TrainerCallback):
    """Calls a function when the Trainer has set its sums to zero, before the first step."""

    def __init__(self, function: Callable[[], None]):
        self._function = function

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._function()


class StopRequest(TrainerCallback):
    """Saves a checkpoint and stops after the step in which a rank saw the launcher's request (a SIGTERM)."""

    def __init__(self, out: Path):
        self._path = checkpoints.stop_request(out)
        self.is_agreed = False

    def is_asked(self) -> bool:
        return self._path.exists()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.is_agreed:
            control.should_save = control.should_training_stop = True


class LogEvents(TrainerCallback):
    """What the Trainer logs of training, into a file and in short on rank 0's output."""

    def __init__(self, path: Path):
        self._log = LogFile(path)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self._log.rewind(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_log |= state.global_step >= state.max_steps  # the steps after the last regular line

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if state.is_world_process_zero and "loss" in logs:
            self._log.add({"step": state.global_step, "of": state.max_steps, **logs})
            shown = ("loss", "learning_rate", "grad_norm", "tokens_per_s", "trained_tokens_per_s", "mfu", "memory_gib")
            values = " ".join(f"{name}={float(logs[name]):.4g}" for name in shown if name in logs)
            print(f"step={state.global_step}/{state.max_steps} {values}", flush=True)


def discard_staged(folder: Path) -> None:
    """What a killed run left half-written."""
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _config_kept(config: Any) -> Iterator[None]:
    """TRL notes in the model's config that no router's loss is its own to compute; a checkpoint must not say so."""
    names = [name for name in ("output_router_logits", "router_aux_loss_coef") if hasattr(config, name)]
    before = {name: getattr(config, name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
