import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from sft_core.recipe.sections import Runtime, Training
from sft_core.train.arguments import OWNED, check_extra, training_arguments
from tests.train.tiny import Run, tiny_recipe


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
        ({"adam_beta2": "high"}, r"training\.extra\.adam_beta2: found 'high'; input should be a valid number"),
    ],
)
def test_extra_wrong_is_an_error_that_says_why(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_extra(extra)


def test_extra_right_or_empty_passes() -> None:
    check_extra({})
    check_extra({"adam_beta2": 0.95, "optim": "adafactor"})


def test_owned_names_are_known_to_trl_or_the_recipe() -> None:
    # A name that TRL no longer has would be a check that checks nothing.
    import dataclasses

    from trl import SFTConfig

    fields = {field.name for field in dataclasses.fields(SFTConfig)}
    assert OWNED - fields - set(Training.model_fields) == set()


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


def test_gradient_checkpointing_changes_nothing(train_here: Callable[..., Run], plain_run: Run) -> None:
    run = train_here(tiny_recipe(training={"gradient_checkpointing": True}))
    curves = [[(event["loss"], event["grad_norm"]) for event in one.events] for one in (run, plain_run)]
    assert json.dumps(curves[0]) == json.dumps(curves[1])
    assert len(curves[0]) == 6
