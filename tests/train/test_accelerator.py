"""What a recipe demands of a machine, told before any work."""

import importlib.util
from pathlib import Path

import pytest
import torch

from sft_core.recipe.parse import parse_recipe
from sft_core.train import accelerator
from sft_core.train.accelerator import has_gpu, liger, lost_updates, slow_precision, unmet_demands
from steps.start import prepare
from tests.train.tiny import phase_recipe, tiny_recipe


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
    message = unmet_demands(phase_recipe(tiny_recipe(**changes)))
    assert message is not None
    assert told in message and "this machine has none" in message
    monkeypatch.setattr(accelerator, "has_gpu", lambda: True)
    remaining = unmet_demands(phase_recipe(tiny_recipe(**changes)))
    assert remaining is None or "bitsandbytes" in remaining or "flash-attn" in remaining


def test_defaults_demand_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "has_gpu", lambda: False)
    assert unmet_demands(phase_recipe(tiny_recipe())) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto chooses otherwise on a GPU")
def test_auto_is_what_runs_on_a_cpu() -> None:
    assert (liger("auto"), liger(True)) == (False, True)


def test_flash_attention_without_its_package_is_refused_on_a_gpu_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert importlib.util.find_spec("flash_attn") is None, "this machine can"
    recipe = phase_recipe(tiny_recipe(model={"attn_implementation": "flash_attention_2"}, training={"bf16": True}))
    monkeypatch.setattr(accelerator, "has_gpu", lambda: True)
    message = unmet_demands(recipe)
    assert message is not None and "pip install flash-attn" in message and "varlen" in message
    with pytest.raises(ValueError, match="flash-attn"):
        accelerator.check_machine(recipe)


@pytest.mark.parametrize("attention", ["varlen", "flash_attention_2"])
def test_attention_of_half_precision_alone_is_refused_in_fp32_on_a_gpu(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    model = {"attn_implementation": attention}
    refused = unmet_demands(phase_recipe(tiny_recipe(model=model)), on_gpu=True)
    assert refused is not None and "only in half precision" in refused
    for changes in ({"training": {"bf16": True}}, {"model": {**model, "dtype": "bfloat16"}}):
        assert unmet_demands(phase_recipe(tiny_recipe(**{"model": model, **changes})), on_gpu=True) is None


@pytest.mark.parametrize(("visible", "is_seen"), [("0,1", True), ("", False), ("-1", False), (None, True)])
def test_gpu_that_is_hidden_is_none(
    visible: str | None, is_seen: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert has_gpu() is is_seen


def test_fp32_on_a_gpu_is_warned_of_with_its_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    in_fp32, in_half = (phase_recipe(tiny_recipe(training={"bf16": half})) for half in (False, True))
    monkeypatch.setattr(accelerator, "has_gpu", lambda: True)
    warning = slow_precision(in_fp32)
    assert warning is not None and "half the speed" in warning and "training.bf16" in warning
    assert slow_precision(in_half) is None
    monkeypatch.setattr(accelerator, "has_gpu", lambda: False)
    assert slow_precision(in_fp32) is None


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
    assert bool(lost_updates(phase_recipe(tiny_recipe(**changes)))) == is_warned


@pytest.mark.slow
def test_prepare_bfloat16_without_masters_warns(small_recipe: dict, caplog: pytest.LogCaptureFixture) -> None:
    prepare(parse_recipe(small_recipe))
    assert not caplog.text
    small_recipe["model"]["dtype"] = "bfloat16"
    prepare(parse_recipe(small_recipe))
    assert "model.dtype bfloat16 keeps no fp32 master weights" in caplog.text


@pytest.mark.slow
def test_prepare_fp32_on_a_gpu_warns(
    small_recipe: dict, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "has_gpu", lambda: True)
    small_recipe["training"]["bf16"] = True
    prepare(parse_recipe(small_recipe))
    assert not caplog.text
    small_recipe["training"]["bf16"] = False
    prepare(parse_recipe(small_recipe))
    assert "training.bf16 is false: a GPU multiplies matrices in TF32" in caplog.text
