"""The same packs trained by each side: our trainer, TRL's, and a bare loop over transformers' model."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import torch
from accelerate.state import AcceleratorState, GradientState
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, TrainerCallback
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from trl import SFTConfig, SFTTrainer

import sft_core.train.assemble
import sft_core.train.main
import sft_core.train.models.model
import sft_core.train.tried_forward
from benchmarks.gpu_parts.jobs import Work, trained_mask, triton_works
from benchmarks.gpu_parts.meter import Measured, Meter, MeterSteps
from benchmarks.gpu_parts.rows import free
from sft_core.train.accelerator import liger
from sft_core.train.arguments import gpu_arguments
from sft_core.train.job import ModelLoader, TokenizerLoader, TrainJob
from sft_core.train.log_file import read_events
from sft_core.train.main import trained

log = logging.getLogger(__name__)
TILE = 8192  # tokens, of a head that computes all its logits
datasets.disable_progress_bars()


@dataclasses.dataclass(frozen=True)
class Run:
    """What a side's training showed. flops_a_step, logged: of ours alone, as its log tells them."""

    measured: Measured
    tokens_a_step: int
    losses: list[float]
    forward: dict[str, Any] = dataclasses.field(default_factory=dict)
    flops_a_step: float | None = None
    logged_tokens_per_s: float | None = None
    checkpointed: bool = False

    @property
    def tokens_per_s(self) -> float:
        return self.tokens_a_step / self.measured.step_s


@contextlib.contextmanager
def apart(config: dict[str, Any], meter: Meter | None = None) -> Iterator[None]:
    """Nothing of a training reaches the next one: Liger replaces layers in a model's module, for later models too."""
    kind = type(AutoConfig.for_model(config["model_type"]))
    module = importlib.import_module(MODEL_FOR_CAUSAL_LM_MAPPING[kind].__module__)
    before = dict(vars(module))
    try:
        yield
    finally:
        if meter is not None:
            meter.close()
        vars(module).update(before)
        AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
        GradientState._reset_state()
        free()


@contextlib.contextmanager
def weights_drawn_on(device: str) -> Iterator[None]:
    """Random weights of billions of parameters, drawn in a second and not in the half minute that a CPU takes."""
    load: Any = sft_core.train.models.model.load_model

    def on_device(model: ModelLoader, tokenizer: TokenizerLoader, **settings: Any) -> Any:
        with torch.device(device) if model.config is not None else contextlib.nullcontext():
            return load(model, tokenizer, **settings)

    with contextlib.ExitStack() as stack:
        for module in (sft_core.train.models.model, sft_core.train.assemble):
            stack.enter_context(patch.object(module, "load_model", on_device))
        yield


def watched(trainer: Any, meter: Meter | None, callbacks: list[TrainerCallback], saves_s: list[float] | None) -> Any:
    """The trainer's class with a clock on its loader, on its saves and after each step.

    saves_s: the seconds of each save. None: nothing is saved, not even after the last step, as the Trainer does.
    """

    class Watched(trainer):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            for callback in callbacks + ([MeterSteps(meter)] if meter is not None else []):
                self.add_callback(callback)

        def get_batch_samples(self, epoch_iterator: Any, *rest: Any) -> Any:
            return super().get_batch_samples(epoch_iterator if meter is None else meter.iterate(epoch_iterator), *rest)

        def _save_checkpoint(self, *rest: Any) -> None:
            if saves_s is None:
                return
            if self.args.device.type == "cuda":
                torch.cuda.synchronize()
            begun = time.perf_counter()
            super()._save_checkpoint(*rest)
            saves_s.append(time.perf_counter() - begun)

    return Watched


@contextlib.contextmanager
def our_trainer(
    meter: Meter | None = None,
    *,
    callbacks: list[TrainerCallback] | None = None,
    fused_head: bool = True,
    saves_s: list[float] | None = None,
    asks_room: bool = True,
) -> Iterator[None]:
    """What `sft_core.train.main` trains with, watched (see there for saves_s). asks_room: before it begins, for all
    that it may save; where it saves nothing it never asks."""
    module = sft_core.train.assemble
    with contextlib.ExitStack() as stack:
        if saves_s is None or not asks_room:
            stack.enter_context(patch.object(sft_core.train.main, "check_room", lambda out, num_bytes: None))
        stack.enter_context(
            patch.object(module, "PackTrainer", watched(module.PackTrainer, meter, callbacks or [], saves_s))
        )
        if not fused_head or not triton_works():
            stack.enter_context(patch.object(sft_core.train.tried_forward, "takes_fused_head", lambda model: False))
        yield


def losses_of(out: Path) -> list[float]:
    return [event["loss"] for event in read_events(out / "logs" / "log.jsonl")]


def logging_steps(meter: Meter) -> int:
    """So that one line of the log is of the timed steps: the first step has a line too."""
    return meter.warm + meter.timed if meter.warm == 1 else meter.timed


def ours(work: Work, folder: Path, device: str, *, warm: int, timed: int, fused_head: bool = True) -> Run:
    meter = Meter(device, warm=warm, timed=timed)
    assert warm in (1, timed) and work.steps == meter.num_steps
    work = dataclasses.replace(work, runtime={"logging_steps": logging_steps(meter), **work.runtime})
    job = work.write(folder)
    with apart(work.config, meter), weights_drawn_on(device), our_trainer(meter, fused_head=fused_head):
        _train_and_release(job)
    logs = job.out / "logs"
    events = read_events(logs / "log.jsonl")
    (event,) = (event for event in events if event["step"] == warm + timed)
    return Run(
        meter.result(),
        work.tokens_a_step,
        [event["loss"] for event in events],
        read_events(logs / "forward.jsonl")[-1],
        event["tflops_per_s"] * 1e12 * work.tokens_a_step / event["tokens_per_s"],
        event["tokens_per_s"],
        work.checkpointing,
    )


def _train_and_release(job: TrainJob) -> None:
    trainer = trained(job)
    trainer.accelerator.free_memory()
    trainer.model = trainer.model_wrapped = trainer.optimizer = None


def load(work: Work, device: str, attention: str) -> tuple[Any, Any]:
    """The model that ours trains, and the tokenizer."""
    spec = work.job(Path(), Path()).spec
    model = dataclasses.replace(spec.model, attn_implementation=attention)
    tokenizer = dataclasses.replace(spec.tokenizer, add_special_tokens=[], eos_token=None)
    with weights_drawn_on(device):
        return sft_core.train.models.model.load_model(model, tokenizer, seed=42, half=True)


def labels_of(ids: Any) -> list[int]:
    found = [int(token) if trains else -100 for token, trains in zip(ids, trained_mask(len(ids)), strict=True)]
    return [-100, *found[1:]]


def trl(work: Work, folder: Path, device: str, *, warm: int, timed: int, attention: str) -> Run:
    """A plain SFTTrainer of the packs, with the settings that ours has: packs as `packing=True` leaves them, which is
    a forward without padding that knows the lengths of the documents."""
    rows = [
        {
            "input_ids": [int(token) for ids in pack for token in ids],
            "labels": [label for ids in pack for label in labels_of(ids)],
            "seq_lengths": [len(ids) for ids in pack],
        }
        for pack in work.documents()
    ]
    meter, packs = Meter(device, warm=warm, timed=timed), work.packs_a_forward or 1
    on_gpu = device == "cuda"
    settings = SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=work.steps,
        per_device_train_batch_size=packs,
        gradient_accumulation_steps=work.packs_a_step // packs,
        bf16=True,
        activation_checkpointing=work.checkpointing,
        use_liger_kernel=liger(work.use_liger),
        learning_rate=2e-5,
        lr_scheduler_type="constant",
        logging_steps=logging_steps(meter),
        save_strategy="no",
        report_to="none",
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        disable_tqdm=True,
        packing=False,
        padding_free=True,
        max_length=None,
        **(gpu_arguments(torch.cuda.get_device_capability()) if on_gpu else {}),
    )
    with apart(work.config, meter):
        model, tokenizer = load(work, device, attention)
        model.config.use_cache = False
        trainer = watched(SFTTrainer, meter, [], None)(
            model, settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
        )
        trainer.train()
        losses = [event["loss"] for event in trainer.state.log_history if "loss" in event]
        trainer.accelerator.free_memory()
        del trainer, model
    return Run(meter.result(), work.tokens_a_step, losses, checkpointed=work.checkpointing)


def bare(work: Work, folder: Path, device: str, *, warm: int, timed: int, attention: str = "varlen") -> Run:
    """The shortest loop that trains packs: autocast, the model's own loss, fused AdamW. All is in memory already."""
    meter = Meter(device, warm=warm, timed=timed)
    with apart(work.config, meter):
        model, _ = load(work, device, attention)
        model.config.use_cache = False
        model.train()
        if work.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0, fused=True)
        batches = [_inputs(pack, device) for pack in work.documents()]
        losses: list[torch.Tensor] = []
        for step in range(work.steps):
            for batch in batches[step * work.packs_a_step :][: work.packs_a_step]:
                with torch.autocast(device, torch.bfloat16):
                    loss = bare_loss(model, batch) / work.packs_a_step
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            meter.step_done(step + 1)
        found = [float(loss) for loss in losses]
        del model, optimizer, batches, loss
    return Run(meter.result(), work.tokens_a_step, found, checkpointed=work.checkpointing)


def bare_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The model's own; of a long pack, whose logits no memory holds, the same a tile at a time."""
    labels_1T = batch["labels"]
    if labels_1T.shape[1] <= TILE:
        return model(**batch, use_cache=False).loss
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden_TH = model.base_model(**inputs, use_cache=False).last_hidden_state[0]
    targets_T = torch.nn.functional.pad(labels_1T[0, 1:], (0, 1), value=-100)

    def of_tile(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model.lm_head(hidden).float(), targets, reduction="sum")

    sums = [
        checkpoint(of_tile, *tile, use_reentrant=False)
        for tile in zip(hidden_TH.split(TILE), targets_T.split(TILE), strict=True)
    ]
    return torch.stack(sums).sum() / (targets_T != -100).sum()


def _inputs(pack: list[Any], device: str) -> dict[str, Any]:
    lengths = torch.tensor([len(ids) for ids in pack])
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32).to(device)
    longest = int(lengths.max())
    return {
        "input_ids": torch.cat([torch.from_numpy(ids).long() for ids in pack])[None].to(device),
        "labels": torch.tensor([label for ids in pack for label in labels_of(ids)])[None].to(device),
        "position_ids": torch.cat([torch.arange(length) for length in lengths.tolist()])[None].to(device),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


Side = Callable[..., Run]


def with_checkpointing_where_needed(
    side: Side, work: Work, folder: Path, device: str, **settings: Any
) -> tuple[Run, Work, str]:
    """The run, its work and a note: again with gradient checkpointing where the memory was not enough without."""
    try:
        return side(work, folder, device, **settings), work, ""
    except torch.OutOfMemoryError:
        if work.checkpointing:
            raise
        log.warning("out of memory without gradient checkpointing")
    free()
    again = dataclasses.replace(work, checkpointing=True)
    return side(again, folder.with_name(folder.name + "-again"), device, **settings), again, "out of memory without; "
