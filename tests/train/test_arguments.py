import dataclasses
import enum
import json
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from trl import SFTConfig

from sft_core.recipe.sections import Runtime, Training
from sft_core.train.arguments import OWNED, WITHOUT_EFFECT, check_extra, training_arguments, warmup_steps
from sft_core.train.sft_fields import sft_fields
from tests.train.tiny import ROOT, Run, tiny_recipe


def arguments(num_data_ranks: int = 1, **training: Any) -> Any:
    runtime = Runtime(save_steps=7, logging_steps=3)
    return training_arguments(
        Training(**training), runtime, num_steps=50, num_data_ranks=num_data_ranks, staging=Path("staging")
    )


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of one rank without sockets: an SFTConfig for gloo asks the group for its size."""
    if dist.is_initialized():  # by a training in this process
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_extra_known_reaches_the_arguments() -> None:
    found = arguments(extra={"adam_beta2": 0.95, "optim": "adafactor"})
    assert found.adam_beta2 == 0.95
    assert found.optim == "adafactor"


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("num_data_ranks", "accumulation"), [(1, 8), (2, 4), (8, 1)])
def test_global_batch_any_ranks_is_the_product(num_data_ranks: int, accumulation: int) -> None:
    found = arguments(num_data_ranks, global_batch_size=8)
    assert found.per_device_train_batch_size == 1
    assert found.gradient_accumulation_steps == accumulation


@pytest.mark.usefixtures("alone")
def test_training_keys_reach_the_arguments() -> None:
    found = arguments(
        bf16=True,
        gradient_checkpointing=True,
        learning_rate=3e-4,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_ratio=0.05,
        weight_decay=0.2,
        max_grad_norm=0.5,
        seed=11,
    )
    assert found.bf16
    assert found.activation_checkpointing
    assert (found.learning_rate, found.weight_decay, found.max_grad_norm, found.seed) == (3e-4, 0.2, 0.5, 11)
    assert found.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert (found.max_steps, found.warmup_steps) == (50, 3)
    assert (found.save_steps, found.logging_steps) == (7, 3)
    assert found.average_tokens_across_devices


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"@@@": 1}, r"training\.extra\.@@@: no field of trl\.SFTConfig$"),
        ({"adam_beta3": 0.9}, r"training\.extra\.adam_beta3: no field of trl\.SFTConfig; did you mean 'adam_beta"),
        ({"packing": True}, r"training\.extra\.packing: set by the recipe's own keys"),
        ({"warmup_ratio": 0.1}, r"training\.extra\.warmup_ratio: set by the recipe's own keys"),
        ({"learning_rate": 1e-3}, r"training\.extra\.learning_rate: set by the recipe's own keys"),
        ({"eval_steps": 9}, r"training\.extra\.eval_steps: it has no effect here: models are scored after training"),
        ({"hub_token": "x"}, r"training\.extra\.hub_token: it has no effect here: a release is pushed by the recipe's"),
        ({"adam_beta2": "high"}, r"training\.extra\.adam_beta2: found 'high'; input should be a valid number"),
    ],
)
def test_extra_wrong_is_an_error_that_says_why(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_extra(extra)


def test_fields_read_off_the_source_are_those_of_the_class() -> None:
    hints = typing.get_type_hints(SFTConfig)
    read = sft_fields()
    assert read.keys() == {field.name for field in dataclasses.fields(SFTConfig)}
    for name, kind in read.items():
        members = {member for member in typing.get_args(hints[name]) or (hints[name],) if not is_enum(member)}
        assert {*typing.get_args(kind)} | {kind} >= members, name


def is_enum(kind: Any) -> bool:
    """Whether YAML gives values of the type as strings."""
    (kind, *_) = typing.get_args(kind) or (kind,)
    return isinstance(kind, type) and (issubclass(kind, enum.Enum) or kind.__name__ == "ParallelismConfig")


def test_extra_is_checked_without_torch_and_trl() -> None:
    code = (
        "import sys; from sft_core.train.arguments import check_extra; check_extra({'adam_beta2': 0.9})\n"
        "assert not {'torch', 'trl', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_extra_right_or_empty_passes() -> None:
    check_extra({})
    check_extra({"adam_beta2": 0.95, "optim": "adafactor"})


# Each was looked up in transformers 5.23 and TRL 1.16: it changes the training, its speed or what is logged.
EFFECTIVE = {
    *("activation_checkpointing_kwargs", "activation_offloading", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("dataloader_in_order", "dataloader_multiprocessing_context", "dataloader_num_workers"),
    *("dataloader_persistent_workers", "dataloader_prefetch_factor", "ddp_broadcast_buffers", "ddp_bucket_cap_mb"),
    *("ddp_static_graph", "ddp_timeout", "debug", "full_determinism", "include_num_input_tokens_seen"),
    *("liger_kernel_config", "log_level", "log_level_replica", "log_on_each_node", "neftune_noise_alpha", "optim"),
    *("optim_args", "optim_target_modules", "project", "run_name", "skip_memory_metrics", "tf32", "torch_compile"),
    *("torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps", "trackio_bucket_id"),
    *("trackio_space_id", "trackio_static_space_id"),
}


def test_every_field_is_set_without_effect_or_effective() -> None:
    """A new version's field is looked up before a recipe may set it."""
    fields = {field.name for field in dataclasses.fields(SFTConfig)}
    assert fields - OWNED - WITHOUT_EFFECT.keys() == EFFECTIVE
    assert not OWNED & WITHOUT_EFFECT.keys() and WITHOUT_EFFECT.keys() <= fields


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 1), (3, 1), (34, 2), (1000, 30)])
def test_a_single_step_has_no_warmup(steps: int, warmup: int) -> None:
    assert warmup_steps(0.03, steps) == warmup


@pytest.mark.slow
def test_a_single_step_learns(train_here: Callable[..., Run]) -> None:
    (line,) = train_here(tiny_recipe(training={"max_steps": 1, "warmup_ratio": 0.03})).events
    assert line["learning_rate"] == pytest.approx(1e-2)


def test_owned_names_are_known_to_trl_or_the_recipe() -> None:
    # A name that TRL no longer has would be a check that checks nothing.
    fields = {field.name for field in dataclasses.fields(SFTConfig)}
    assert OWNED - fields - set(Training.model_fields) == set()


@pytest.mark.slow
def test_bf16_run_computes_in_bfloat16_and_keeps_weights_in_float32(
    train_here: Callable[..., Run], plain_run: Run
) -> None:
    run = train_here(tiny_recipe(training={"bf16": True, "gradient_checkpointing": True, "max_steps": 2}))
    for found, plain in zip(run.events, plain_run.events, strict=False):
        assert found["loss"] == pytest.approx(plain["loss"], rel=1e-2)
        assert found["loss"] != pytest.approx(plain["loss"], rel=1e-6)
    assert len(run.events) == 2
    saved = load_file(run.model / "model.safetensors")
    assert len(saved) > 10
    assert all(values.dtype == torch.float32 for values in saved.values())


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(train_here: Callable[..., Run], plain_run: Run) -> None:
    run = train_here(tiny_recipe(training={"gradient_checkpointing": True}))
    curves = [[(event["loss"], event["grad_norm"]) for event in one.events] for one in (run, plain_run)]
    assert json.dumps(curves[0]) == json.dumps(curves[1])
    assert len(curves[0]) == 6
