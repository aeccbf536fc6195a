"""The recipe's training section as TRL's SFTConfig, and the check of `training.extra`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_core.recipe.wording import nearest
from sft_core.train.accelerator import liger
from sft_core.train.sft_fields import sft_fields

if TYPE_CHECKING:
    from trl import SFTConfig

    from sft_core.recipe.sections import Runtime, Training

_EVALUATION = "models are scored after training, by the recipe's evaluation section"
_PUSH = "a release is pushed by the recipe's hub section"
# Fields of SFTConfig that change nothing here, and why. Whoever sets one expects something of it.
WITHOUT_EFFECT = {
    **dict.fromkeys(
        (
            *("batch_eval_metrics", "bf16_full_eval", "do_eval", "do_predict", "eval_accumulation_steps", "eval_delay"),
            *("eval_do_concat_batches", "eval_on_start", "eval_steps", "eval_use_gather_object", "fp16_full_eval"),
            *("greater_is_better", "include_for_metrics", "label_names", "metric_for_best_model"),
            "prediction_loss_only",
        ),
        _EVALUATION,
    ),
    **dict.fromkeys(
        ("hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy", "hub_token"), _PUSH
    ),
    "dataloader_drop_last": "a schedule has whole steps",
    "do_train": "a run trains",
    "enable_jit_checkpoint": "a SIGTERM saves a checkpoint as it is",
    "gradient_checkpointing_kwargs": "set activation_checkpointing_kwargs",
    "length_column_name": "packs are not grouped by length",
    "local_rank": "the launcher sets it",
    "restore_callback_states_from_checkpoint": "a resume restores all state as it is",
    "save_on_each_node": "the first node writes the checkpoints",
    "use_cache": "training needs no cache, and a release is saved with it",
}
# Fields of SFTConfig that the recipe's keys set or the pipeline fixes; training.extra may set all others.
OWNED = frozenset(
    {
        "accelerator_config", "activation_checkpointing", "assistant_only_loss", "auto_find_batch_size",
        "average_tokens_across_devices", "bf16", "chat_template_path", "completion_only_loss", "data_seed",
        "dataloader_pin_memory", "dataset_kwargs", "dataset_num_proc", "dataset_text_field", "ddp_backend",
        "ddp_find_unused_parameters", "deepspeed", "disable_tqdm", "eos_token", "eval_packing", "eval_strategy",
        "fp16", "fsdp", "fsdp_config", "gradient_accumulation_steps", "gradient_checkpointing", "ignore_data_skip",
        "label_smoothing_factor", "learning_rate", "load_best_model_at_end", "logging_first_step",
        "logging_nan_inf_filter", "logging_steps",
        "logging_strategy", "loss_type", "lr_scheduler_kwargs", "lr_scheduler_type", "max_grad_norm", "max_length",
        "max_steps", "model_init_kwargs", "num_train_epochs", "output_dir", "packing", "packing_strategy",
        "pad_to_multiple_of", "pad_token", "padding_free", "parallelism_config", "per_device_eval_batch_size",
        "per_device_train_batch_size", "push_to_hub", "remove_unused_columns", "report_to",
        "resume_from_checkpoint", "router_aux_loss_coef", "save_only_model", "save_steps", "save_strategy",
        "save_total_limit", "seed", "shuffle_dataset", "train_sampling_strategy", "truncation_mode",
        "trust_remote_code", "use_cpu", "use_liger_kernel", "warmup_ratio", "warmup_steps", "weight_decay",
    }
)  # fmt: skip


def check_extra(extra: dict[str, Any]) -> None:
    """Raises ValueError for a key that SFTConfig lacks, that is set already or without effect, and for a wrong type."""
    if not extra:
        return
    from pydantic import TypeAdapter, ValidationError

    fields = sft_fields()
    for name, value in extra.items():
        if name in OWNED:
            raise ValueError(f"training.extra.{name}: set by the recipe's own keys or by the pipeline; remove it")
        if name in WITHOUT_EFFECT:
            raise ValueError(f"training.extra.{name}: it has no effect here: {WITHOUT_EFFECT[name]}; remove it")
        if name not in fields:
            hint = nearest(name, fields, otherwise="")  # it has 150 fields
            raise ValueError(f"training.extra.{name}: no field of trl.SFTConfig{hint}")
        try:
            TypeAdapter(fields[name]).validate_python(value, strict=not isinstance(value, str))
        except ValidationError as error:
            raise ValueError(f"training.extra.{name}: found {value!r}; {error.errors()[0]['msg'].lower()}") from None


def check_report_to(trackers: Sequence[str]) -> None:
    """Raises ValueError for a tracker that the Trainer does not know, or whose package is not installed."""
    if not trackers or list(trackers) in (["all"], ["none"]):  # every installed tracker, and none
        return
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for tracker in trackers:
        if tracker not in INTEGRATION_TO_CALLBACK:
            hint = nearest(tracker, INTEGRATION_TO_CALLBACK)
            raise ValueError(f"runtime.report_to: found {tracker!r}, which is no tracker of the Trainer's{hint}")
        try:
            INTEGRATION_TO_CALLBACK[tracker]()  # as the Trainer will
        except (ImportError, RuntimeError, ValueError) as error:
            reason = str(error).strip().rstrip(".")
            raise ValueError(f"runtime.report_to: {tracker} cannot be used here: {reason}; or leave it out") from None


def training_arguments(
    training: Training, runtime: Runtime, *, num_steps: int, num_data_ranks: int, staging: Path
) -> SFTConfig:
    """SFTConfig for one pack a micro-batch; accumulation follows from the global batch and the ranks that divide it.

    On a GPU fp32 matrices are multiplied in TF32, the host does not wait for copies to the device, and a process loads
    the next batches; `extra` can change all three.
    """
    import torch
    from trl import SFTConfig

    on_cpu = not torch.cuda.is_available()
    of_gpu = {} if on_cpu else gpu_arguments(torch.cuda.get_device_capability())
    free: dict[str, Any] = {**of_gpu, **training.extra}
    return SFTConfig(
        output_dir=str(staging),
        max_steps=num_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=training.global_batch_size // num_data_ranks,
        average_tokens_across_devices=True,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        lr_scheduler_kwargs=training.lr_scheduler_kwargs or None,
        warmup_steps=warmup_steps(training.warmup_ratio, num_steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        bf16=training.bf16,
        activation_checkpointing=training.gradient_checkpointing,
        ddp_find_unused_parameters=False,
        use_liger_kernel=liger(training.use_liger_kernel),
        seed=training.seed,
        logging_steps=runtime.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # True makes the host wait for each loss, and logs infinite losses as 0
        router_aux_loss_coef=0.0,  # PackTrainer adds the router's loss itself
        save_strategy="steps",
        save_steps=runtime.save_steps,
        report_to=list(runtime.report_to) or "none",
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu else None,
        dataloader_pin_memory=not on_cpu,
        disable_tqdm=True,
        remove_unused_columns=False,
        packing=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        **free,
    )


def warmup_steps(ratio: float, num_steps: int) -> int:
    """Steps in which the learning rate rises. The first of them has a rate of 0, so a single step gets no warmup."""
    return math.ceil(ratio * num_steps) if num_steps > 1 else 0


def gpu_arguments(capability: tuple[int, int]) -> dict[str, int | dict[str, bool]]:
    """The SFTConfig arguments for a GPU of this compute capability."""
    return {
        "tf32": capability >= (8, 0),
        "accelerator_config": {"non_blocking": True},
        "dataloader_num_workers": 1,
        "dataloader_prefetch_factor": 8,
    }
