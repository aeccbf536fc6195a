"""What a recipe demands of a machine, told before any work."""

import pytest
import torch

from sft_core.recipe import parse_recipe
from sft_core.train import accelerator
from sft_core.train.accelerator import attention, liger, lost_updates, unmet_demands
from steps.pipeline import prepare
from tests.train.tiny import tiny_recipe


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": {"attn_implementation": "flash_attention_2"}}, "flash_attention_2"),
        ({"model": {"attn_implementation": "flex_attention"}}, "no backward pass"),
        ({"training": {"use_liger_kernel": True}}, "use_liger_kernel"),
        ({"training": {"lora": {"load_in_4bit": True}}}, "QLoRA"),
        ({"runtime": {"distributed": "fsdp2"}}, "fsdp2"),
    ],
)
def test_demand_without_a_gpu_is_one_clear_message(changes: dict, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "has_gpu", lambda: False)
    message = unmet_demands(parse_recipe(tiny_recipe(**changes)))
    assert message is not None
    assert told in message and "this machine has none" in message
    monkeypatch.setattr(accelerator, "has_gpu", lambda: True)
    remaining = unmet_demands(parse_recipe(tiny_recipe(**changes)))
    assert remaining is None or "bitsandbytes" in remaining


def test_defaults_demand_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "has_gpu", lambda: False)
    assert unmet_demands(parse_recipe(tiny_recipe())) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto chooses otherwise on a GPU")
def test_auto_is_what_runs_on_a_cpu() -> None:
    assert (attention("auto"), attention("eager"), liger("auto"), liger(True)) == ("sdpa", "eager", False, True)


@pytest.mark.parametrize(
    ("changes", "is_warned"),
    [
        ({"model": {"dtype": "bfloat16"}}, True),
        ({"model": {"dtype": "bfloat16"}, "training": {"lora": {}}}, False),
        ({"model": {"dtype": "bfloat16"}, "runtime": {"distributed": "zero3"}}, False),
        ({"training": {"bf16": True}}, False),
    ],
)
def test_weights_in_bfloat16_alone_are_warned_of(changes: dict, is_warned: bool) -> None:
    assert bool(lost_updates(parse_recipe(tiny_recipe(**changes)))) == is_warned


def test_prepare_bfloat16_without_masters_warns(small_recipe: dict, caplog: pytest.LogCaptureFixture) -> None:
    prepare(parse_recipe(small_recipe))
    assert not caplog.text
    small_recipe["model"]["dtype"] = "bfloat16"
    prepare(parse_recipe(small_recipe))
    assert "model.dtype bfloat16 keeps no fp32 master weights" in caplog.text
