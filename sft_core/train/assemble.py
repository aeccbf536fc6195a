"""Prepares a rank's training: the schedule, the start model, the trainer."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig

from sft_core.data.packing.balance import pack_costs, slowest_over_mean
from sft_core.data.packing.plan import PackPlan
from sft_core.data.shards.token_shards import row_ids
from sft_core.recipe.rank_strategies import STRATEGIES
from sft_core.recipe.wording import some
from sft_core.train.arguments import training_arguments
from sft_core.train.callbacks import LogEvents
from sft_core.train.checkpoints import restore_logs
from sft_core.train.collate import PackCollator, slot_alone
from sft_core.train.continuation import Continuation, resumable
from sft_core.train.first_rank import is_first_rank, on_first_rank
from sft_core.train.flops import Flops, training_flops
from sft_core.train.forwards import busiest_packs, in_forwards, packs_a_forward
from sft_core.train.hooks import AnswerScorer, Sampler, Watch
from sft_core.train.job import ModelLoader, TrainJob
from sft_core.train.log_file import LogFile
from sft_core.train.models.attention import choose_attention
from sft_core.train.models.lora import lora_config
from sft_core.train.models.model import load_model, save_adapter, save_checkpoint, skeleton, try_save
from sft_core.train.models.router import RouterLoss, router_loss
from sft_core.train.objectives.sft import Sft
from sft_core.train.online import OnlineSchedule
from sft_core.train.probe import Isolation, class_isolation
from sft_core.train.schedule import EMPTY, order_coefficients, step_packs
from sft_core.train.selection import Selection, SelectionLosses, evaluation_steps
from sft_core.train.speed import peak_flops_per_s
from sft_core.train.trainer import PackTrainer

NUM_RANKS = "WORLD_SIZE"  # torchrun's variable


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """The packs of each step, planned before the model is loaded.

    shape: the start model without weights. schedule: pack numbers by step, shape (steps, global_batch_size). costs: the
    cost of each pack; the schedule puts packs of similar cost into one batch.
    """

    shape: Any
    collator: PackCollator
    flops: Flops
    costs: np.ndarray
    schedule: np.ndarray


def plan_training(job: TrainJob) -> TrainingPlan:
    """The plan of a job's training. Raises ValueError if a document is longer than the model's context."""
    model, training = job.spec.model, job.spec.training
    shape = skeleton(
        path=model.path, revision=model.revision, config=model.config, trust_remote_code=model.trust_remote_code
    )
    collator = PackCollator.open(job.packs, job.tokens)
    context = getattr(shape.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and collator.longest_document > context:
        raise ValueError(
            f"packing.max_length: a row has {collator.longest_document} tokens, and the model was made for {context} "
            "(max_position_embeddings); lower packing.max_length"
        )
    linear, quadratic = order_coefficients(shape)
    costs = pack_costs(collator.plan.num_tokens, collator.plan.offsets, linear=linear, quadratic=quadratic)
    schedule = step_packs(
        costs,
        global_batch_size=training.global_batch_size,
        num_epochs=training.num_train_epochs,
        max_steps=training.max_steps,
        seed=training.seed + job.round,  # each roll-out orders its rows differently
    )
    return TrainingPlan(shape, collator, training_flops(shape), costs, schedule)


def online_schedule(job: TrainJob, plan: TrainingPlan, sampler: Sampler) -> OnlineSchedule:
    num_steps, global_batch_size = plan.schedule.shape
    return OnlineSchedule(
        sampler,
        plan.collator,
        job.out / "logs" / "online.jsonl",
        num_steps=num_steps,
        global_batch_size=global_batch_size,
        costs=plan.flops.of_documents(plan.collator.plan.num_tokens, plan.collator.num_trained),
    )


@dataclasses.dataclass(frozen=True)
class Start:
    """The start model, the Trainer's arguments, and the checkpoint that training resumes from, if any."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    arguments: SFTConfig
    checkpoint: Path | None
    of_class: Isolation | None
    router: RouterLoss | None


def _to_resume(job: TrainJob, num_ranks: int) -> Path | None:
    """The checkpoint to resume from, whose logs are put in place."""
    checkpoint = resumable(job.out / "checkpoints", job.runtime.distributed, num_ranks)
    if checkpoint is not None:
        restore_logs(checkpoint, job.out / "logs")
    return checkpoint


def load_start(job: TrainJob, plan: TrainingPlan) -> Start:
    """Loads the start model and connects the ranks. All ranks call it together."""
    spec, training = job.spec, job.spec.training
    num_ranks, half = int(os.environ.get(NUM_RANKS, "1")), spec.computes_in_half
    num_data_ranks = STRATEGIES[job.runtime.distributed].num_data_ranks(num_ranks)
    router = router_loss(plan.shape.config, training.router_aux_loss_coef)
    load = functools.partial(
        load_model,
        spec.model,
        spec.tokenizer,
        seed=training.seed,
        load_in_4bit=training.lora is not None and training.lora.load_in_4bit,
        half=half,
    )
    # Try the small model before TrainingArguments switch on ZeRO-3: after that each rank holds only a share of it.
    of_class = class_isolation_here(plan.shape.config, spec.model, half=half)
    # Draw random weights before TrainingArguments switch on ZeRO-3's sharded initialisation: after that each rank draws
    # different numbers for its shard. Load a file's weights afterwards: then transformers loads a rank's share alone.
    loaded = load() if spec.model.config is not None else None
    arguments = training_arguments(
        training, job.runtime, num_steps=len(plan.schedule), num_data_ranks=num_data_ranks, staging=job.out / "staging"
    )
    # TrainingArguments have connected the ranks. Rank 0 checks for all: a checkpoint has many gigabytes.
    checkpoint = on_first_rank(lambda: _to_resume(job, num_ranks))
    model, tokenizer = loaded or load()
    on_first_rank(lambda: try_save(model, tokenizer, spec.chat_template, job.out / "staging" / "tried"))
    model.config.use_cache = False
    number = packs_a_forward(
        job.runtime.tokens_per_forward,
        written=None if checkpoint is None else Continuation.read(checkpoint).packs_a_forward,
        plan=plan.collator.plan,
        packs_a_rank=training.global_batch_size // num_data_ranks,
        attention=model.config._attn_implementation,
        together=of_class is None or of_class.document_inputs is not None,
        busiest=_busiest(job, plan.shape, model.config._attn_implementation),
    )
    arguments.per_device_train_batch_size = number
    arguments.gradient_accumulation_steps = training.global_batch_size // (num_data_ranks * number)
    return Start(model, tokenizer, arguments, checkpoint, of_class, router)


def selection_of(
    job: TrainJob,
    plan: TrainingPlan,
    start: Start,
    watch: Callable[[int], Watch] | None,
    answers: Callable[..., AnswerScorer | None] | None,
) -> Selection | None:
    """The evaluations during training; None if the job has none. watch, answers: see main.trained."""
    asked, batch_size = job.spec.selection, job.spec.training.global_batch_size
    if asked is None:
        return None
    assert job.selection_packs is not None
    collator = PackCollator.open(job.selection_packs, job.tokens)
    steps_per_epoch = math.ceil(len(plan.collator.plan) / batch_size)
    scorer = None
    if answers is not None:
        forward = plan.flops.of(1.0, 0.0, 1.0) / 3  # a forward pass takes a third of the training's FLOPs
        scorer = answers(collator.plan, tokenizer=start.tokenizer, flops_a_token=forward)
    return Selection(
        SelectionLosses(collator),
        job.spec.sources,
        evaluation_steps(len(plan.schedule), steps_per_epoch, asked.every_epochs),
        job.out / "logs" / "selection.jsonl",
        keep_best=asked.keep_best,
        watch=watch(steps_per_epoch) if watch is not None else None,
        answers=scorer,
    )


def make_trainer(
    job: TrainJob, plan: TrainingPlan, start: Start, online: OnlineSchedule | None, selection: Selection | None
) -> PackTrainer:
    """The trainer of a job. online: draws the packs during training; None: the plan's schedule is fixed."""
    spec, out, lora = job.spec, job.out, job.spec.training.lora
    number = start.arguments.per_device_train_batch_size
    num_ranks = STRATEGIES[job.runtime.distributed].num_data_ranks(int(os.environ.get(NUM_RANKS, "1")))
    slots = plan.schedule if online is None else np.arange(plan.schedule.size).reshape(plan.schedule.shape)
    if is_first_rank() and online is None:
        log_balance(
            out / "logs" / "balance.jsonl", plan.costs, plan.schedule, num_ranks, job.runtime.distributed, number
        )
    trainer = PackTrainer(
        model=start.model,
        args=start.arguments,
        train_dataset=Dataset.from_dict({"pack": in_forwards(slots, num_ranks, number).ravel()}),
        data_collator=plan.collator if online is None else slot_alone,
        processing_class=start.tokenizer,
        peft_config=lora_config(lora, start.model, spec.tokenizer.add_special_tokens, start.tokenizer),
        callbacks=[LogEvents(out / "logs" / "log.jsonl")],
        objective=Sft(),
        sources=spec.sources,
        strategy=job.runtime.distributed,
        folder=out / "checkpoints",
        keep=job.runtime.keep_checkpoints,
        flops=plan.flops,
        selection=selection,
        online=online,
        of_class=start.of_class,
        router=start.router,
        forward_log=LogFile(out / "logs" / "forward.jsonl"),
        name_rows=functools.partial(name_rows, plan.collator.plan, job.tokens, spec.sources),
        write_model=functools.partial(_write_model, start.tokenizer, spec.chat_template, lora is not None),
    )
    trainer.remove_callback(PrinterCallback)  # LogEvents prints
    return trainer


def name_rows(plan: PackPlan, tokens: list[list[Path]], sources: list[str], entries: np.ndarray) -> str:
    """The row_ids of documents of the plan, by source, as a text. tokens: as in TrainJob."""
    texts = []
    for number in np.unique(plan.source[entries]).tolist():
        rows = np.unique(plan.row[entries][plan.source[entries] == number])
        texts.append(f"{sources[number]}: {some(row_ids(tokens[number], rows))}")
    return "; ".join(texts)


def bytes_on_disk(num_parameters: int, job: TrainJob) -> int:
    """The most bytes that checkpoints and models take.

    Beside the kept checkpoints there are a staged one and the best one. LoRA's checkpoints are small and count as 0.
    """
    spec = job.spec
    bytes_a_parameter = STRATEGIES[job.runtime.distributed].checkpoint_bytes
    checkpoint = 0 if spec.training.lora is not None else bytes_a_parameter * num_parameters
    num_kept = job.runtime.keep_checkpoints + 1 + (spec.selection is not None and spec.selection.keep_best)
    return checkpoint * num_kept + 4 * num_parameters * spec.num_models


def class_isolation_here(config: Any, model: ModelLoader, *, half: bool) -> Isolation | None:
    """Whether the model's class isolates packed documents, with this rank's attention and device."""
    trust, on_gpu = model.trust_remote_code, torch.cuda.is_available()
    return class_isolation(
        config,
        attention=choose_attention(model.attn_implementation, config, half=half, trust_remote_code=trust),
        trust_remote_code=trust,
        half=half and on_gpu,
        device=f"cuda:{_local_rank()}" if on_gpu else "cpu",
    )


def log_balance(
    path: Path, costs: np.ndarray, schedule: np.ndarray, num_ranks: int, strategy: str, packs_a_forward: int = 1
) -> None:
    """Writes how evenly the schedule spreads FLOPs over the ranks, for the card. costs: of each pack."""
    slots = np.where(schedule == EMPTY, 0.0, costs[schedule])
    slots = slots.reshape(len(slots), -1, packs_a_forward, num_ranks).sum(axis=2).reshape(len(slots), -1)
    ratio = slowest_over_mean(slots, num_ranks, each_micro_step=STRATEGIES[strategy].shards_weights)
    event = {"ranks": num_ranks, "packs_a_step": schedule.shape[1], "slowest_over_mean": round(ratio, 6)}
    path.write_text(
        json.dumps(event) + "\n"
    )  # a line of JSON, as in a log: a card that reads meanwhile skips a half-written line


def _busiest(job: TrainJob, shape: Any, attention: str) -> Callable[[int], int]:
    """A function from tokens per pack to the number of packs that keep this rank's GPU busy; 1 without a GPU."""
    if not torch.cuda.is_available():
        return lambda longest: 1
    device = torch.device("cuda", _local_rank())
    return functools.partial(
        busiest_packs,
        training=job.spec.training,
        runtime=job.runtime,
        shape=shape,
        dtype=job.spec.model.dtype,
        attention=attention,
        memory=torch.cuda.get_device_properties(device).total_memory,
        peak=peak_flops_per_s(device),
    )


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _write_model(
    tokenizer: Any,
    chat_template: str | None,
    is_adapter: bool,
    model: Any,
    weights: dict[str, torch.Tensor] | None,
    folder: Path,
) -> None:
    if is_adapter:
        save_adapter(model, weights, tokenizer, folder / "adapter")
    else:
        save_checkpoint(model, tokenizer, chat_template, folder, weights)
