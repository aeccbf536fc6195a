"""The verdict as an output: tried once, in `start`, before any download; a plan reads it and builds nothing."""

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sft_core.pins.pinned import PinnedRecipe, pin
from sft_core.recipe.parse import override, parse_recipe
from sft_core.store.stage import Located
from sft_core.store.store import Store
from steps import verdict
from steps.plan import plan
from steps.start import prepare
from steps.train import TRAINED
from steps.verdict import VERDICT, ensure_verdicts, verdict_lines


def builds(data: dict[str, Any]) -> list[str]:
    path = Path(data["runtime"]["store"]) / "builds.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def planned(data: dict[str, Any], *overrides: str) -> tuple[Store, PinnedRecipe, list[Located]]:
    pinned = pin(parse_recipe(override(data, overrides)))
    store = Store(pinned.recipe.runtime.store)
    return store, pinned, plan(store, pinned)


@pytest.mark.slow
def test_start_tries_once_and_says_what_came_out(small_recipe, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        prepare(parse_recipe(small_recipe))
        (build,) = builds(small_recipe)
        (file,) = Path(small_recipe["runtime"]["store"]).glob("verdict/*/verdict.json")
        assert json.loads(file.read_text())["attention"] == "sdpa"
        assert '"verdict"' in build and caplog.text.count("tried: llama of 5,128") == 1
        prepare(parse_recipe(small_recipe))
    assert builds(small_recipe) == [build] and caplog.text.count("tried: llama of 5,128") == 2


BAD = (
    ("model.config.hiden_size=8", "model.config.hiden_size: no key of a llama model; did you mean 'hidden_size'?"),
    ("training.extra={adam_beta2: 1.5}", "training.extra.adam_beta2: found 1.5; Invalid beta parameter"),
    ("training.lora={target_modules: [queries]}", "training.lora.target_modules: found 'queries'"),
    ("training.lr_scheduler_kwargs={min_lr_ratio: 0.1}", "training.lr_scheduler_kwargs.min_lr_ratio: no setting"),
)


@pytest.mark.slow
@pytest.mark.parametrize(("change", "message"), BAD)
def test_what_cannot_train_ends_start_before_any_download_and_is_not_stored(small_recipe, change: str, message: str):
    bad = parse_recipe(override(small_recipe, (change,)))
    with pytest.raises(ValueError) as raised:
        prepare(bad)
    assert message in str(raised.value)
    assert builds(small_recipe) == []


@pytest.mark.slow
def test_plan_reads_the_verdict_and_builds_none(small_recipe, sft, save_recipe):
    path = save_recipe(small_recipe)
    before = sft("plan", path)
    assert "start of a run tries what training needs" in before.output and "tried: " not in before.output
    assert builds(small_recipe) == []
    prepare(parse_recipe(small_recipe))
    (build,) = builds(small_recipe)
    after = sft("plan", path)
    assert "tried: llama of 5,128" in after.output and "start of a run tries" not in after.output
    assert builds(small_recipe) == [build]


@pytest.mark.slow
def test_plan_with_memory_tries_now_and_stores_nothing(small_recipe, sft, save_recipe):
    path = save_recipe(small_recipe)
    assert "tried: llama of 5,128" in sft("plan", path, "--memory").output
    for change, message in BAD:
        assert message in sft("plan", path, "--memory", "--set", change).output, "a line: the run may be elsewhere"
    assert builds(small_recipe) == []


@pytest.mark.slow
def test_plan_imports_neither_torch_nor_trl(small_recipe, save_recipe):
    asked = (
        "import sys; from steps.cli.main import main\n"
        "main([*sys.argv[1:]], standalone_mode=False)\n"
        "assert not {'torch', 'trl', 'transformers'} & {*sys.modules}, 'slow'"
    )
    extra = ("--set", "training.extra={adam_beta2: 0.9}")
    done = subprocess.run(
        [sys.executable, "-c", asked, "plan", save_recipe(small_recipe), *extra], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "start of a run tries" in done.stderr


def test_nothing_is_tried_where_the_training_is_there(small_recipe):
    store, pinned, outputs = planned(small_recipe, "model.config.hiden_size=8")
    trained = [dataclasses.replace(each, status="hit") if each.stage is TRAINED else each for each in outputs]
    assert ensure_verdicts(store, pinned, trained) == [] == verdict_lines(store, pinned, trained, tries=True)
    with pytest.raises(ValueError, match="hiden_size"):
        ensure_verdicts(store, pinned, outputs)


def key_of(data: dict[str, Any], *overrides: str) -> str:
    store, pinned, _ = planned(data, *overrides)
    located = store.locate(VERDICT, pinned, {})
    assert located.ref is not None
    return located.ref.key


@pytest.mark.parametrize(
    ("change", "is_new"),
    [
        ("training.learning_rate=1e-3", True),
        ("training.lora={r: 4}", True),
        ("training.extra={adam_beta2: 0.9}", True),
        ("model.config.hidden_size=16", True),
        ("model.attn_implementation=eager", True),
        ("model.add_special_tokens=[<x>]", True),
        ("model.trust_remote_code=true", True),
        ("packing.max_length=64", True),
        ("training.loss_scope=all", False),
        ("dataset_mixture.seed=3", False),
        ("runtime.num_processes=2", False),
        ("runtime.save_steps=3", False),
    ],
)
def test_key_has_what_is_tried_and_no_more(small_recipe, change: str, is_new: bool):
    assert (key_of(small_recipe, change) != key_of(small_recipe)) is is_new


def test_key_has_the_libraries_and_what_trains(small_recipe, monkeypatch: pytest.MonkeyPatch):
    before, section = key_of(small_recipe), VERDICT.section(pin(parse_recipe(small_recipe)), {})
    assert {"torch", "transformers", "trl", "peft", "deepspeed"} <= {*section["libraries"]}
    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.version", lambda name: "0")
        other = VERDICT.section(pin(parse_recipe(small_recipe)), {})
        assert {*other["libraries"].values()} == {"0"} and {**other, "libraries": section["libraries"]} == section
    monkeypatch.setattr(verdict, "has_gpu", lambda: section["device"] != "gpu")
    with_gpu = key_of(small_recipe)
    monkeypatch.setenv("METAFLOW_KUBERNETES_WORKLOAD", "1")
    assert len({before, with_gpu, key_of(small_recipe)}) == 3


@pytest.mark.slow
def test_every_phase_is_tried_and_the_faults_of_all_are_said(small_recipe):
    phase = {key: small_recipe.pop(key) for key in ("dataset_mixture", "training")}
    first, second = phase["dataset_mixture"]["datasets"]
    mixture = {"report_share": 0.15}
    small_recipe["phases"] = {
        "mid": {"dataset_mixture": {**mixture, "datasets": [first]}, "training": {"extra": {"adam_beta2": 1.5}}},
        "sft": {"dataset_mixture": {**mixture, "datasets": [second]}, "training": {"lora": {"target_modules": ["q"]}}},
    }
    with pytest.raises(ValueError) as raised:
        prepare(parse_recipe(small_recipe))
    assert "phase mid: training.extra.adam_beta2" in str(raised.value)
    assert "phase sft: training.lora.target_modules: found 'q'" in str(raised.value)
    assert builds(small_recipe) == []
