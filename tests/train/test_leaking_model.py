"""A model in which packed documents see each other, from the plan to the card: told, and trained rightly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from sft_core.data.packing.plan import PackPlan
from sft_core.data.shards.token_shards import TokenShards
from sft_core.pins.pinned import PinnedRecipe
from sft_core.recipe.parse import parse_recipe
from sft_core.store.store import Store
from sft_core.train.accelerator import unseen_gpu
from sft_core.train.job import TrainJob
from sft_core.train.models.model import load_model
from sft_core.train.preflight import LONG, try_class
from sft_core.train.schedule import step_packs
from steps.cards.training import card
from steps.cli.main import main
from steps.start import prepare
from tests.browser import Browser
from tests.train.test_objective import costs_of, documents_of
from tests.train.test_strategies import trained
from tests.train.tiny import LLAMA, OPT, Run, phase_recipe, tiny_recipe


def opt_recipe(**changes: Any) -> dict[str, Any]:
    return tiny_recipe(**{"model": {"config": OPT}, "training": {"max_steps": 2, "learning_rate": 1e-3}, **changes})


@pytest.fixture(scope="module")
def run(train_here: Callable[..., Run]) -> Run:
    return train_here(opt_recipe())


@pytest.mark.slow
def test_loss_is_that_of_documents_by_themselves(run: Run, make_job: Callable[[PinnedRecipe, Path], TrainJob]) -> None:
    job = make_job(run.pinned, run.folder)
    plan, shards = PackPlan.read(job.packs), [TokenShards(*folders) for folders in job.tokens]
    model, _ = load_model(job.spec.model, job.spec.tokenizer, seed=42)
    first = step_packs(costs_of(plan, model), global_batch_size=4, num_epochs=1, max_steps=1, seed=42)[0]
    nll = []
    with torch.no_grad():
        for ids, mask in documents_of(plan, shards, first):
            logits = model(ids[None], use_cache=False).logits[0, :-1]
            nll.append(F.cross_entropy(logits, ids[1:], reduction="none")[mask])
    assert run.events[0]["loss"] == pytest.approx(torch.cat(nll).mean().item(), rel=1e-5)


@pytest.mark.slow
def test_log_and_card_tell_that_documents_are_alone(run: Run, browser: Browser) -> None:
    (told,) = [json.loads(line) for line in (run.folder / "logs" / "forward.jsonl").read_text().splitlines()]
    assert told["documents"] == "alone" and told["told_by"] is None and "exchanged" in told["evidence"]
    page = browser.card(card(run.folder))
    assert page.errors == []
    assert "each in a forward of its own" in dict(page.tables[0])["documents of a pack"]


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_two_ranks_with_unlike_numbers_of_documents_train_as_one(
    strategy: str, run: Run, store: Store, tmp_path: Path
) -> None:
    two = trained(store, opt_recipe(runtime={"num_processes": 2, "distributed": strategy}), tmp_path / "two")
    for found, expected in zip(two.events, run.events, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_start_and_plan_tell_it_before_any_work(
    small_recipe: dict[str, Any], save_recipe: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    small_recipe["model"]["config"] = OPT
    prepare(parse_recipe(small_recipe))
    assert "documents of a pack see each other in this model (opt, sdpa)" in caplog.text
    result = CliRunner().invoke(main, ["plan", save_recipe(small_recipe), "--memory"])
    assert result.exit_code == 0 and "documents of a pack see each other in this model" in result.output


LOADER = {"path": None, "revision": None, "trust_remote_code": False}


@pytest.mark.parametrize(
    ("kind", "attention", "runs"),
    [("gemma2", "sdpa", False), ("gpt_oss", "varlen", False), ("gemma2", "auto", True), ("llama", "varlen", True)],
)
def test_attention_that_a_class_does_not_run_with_is_refused_before_any_work(
    kind: str, attention: str, runs: bool
) -> None:
    recipe = phase_recipe(
        tiny_recipe(model={"config": {**LLAMA, "model_type": kind}, "attn_implementation": attention})
    )
    loader = {**LOADER, "config": recipe.model.config}
    if runs:
        assert try_class(recipe, loader).warnings == []
    else:
        with pytest.raises(ValueError, match=f"found '{attention}', with which a {kind} model does not run"):
            try_class(recipe, loader)


def test_mask_of_a_long_pack_is_told_with_its_size() -> None:
    config = {**LLAMA, "num_hidden_layers": 36}
    recipe = tiny_recipe(model={"config": config}, packing={"max_length": 32_768})
    (told,) = try_class(phase_recipe(recipe), {**LOADER, "config": config}).warnings
    assert "sdpa attention builds a mask of 32768 x 32768, 4.0 GiB, and each of 36 layers keeps one" in told
    recipe["packing"]["max_length"] = LONG
    assert try_class(phase_recipe(recipe), {**LOADER, "config": config}).warnings == []
    recipe["packing"]["max_length"], recipe["model"]["attn_implementation"] = 32_768, "varlen"
    assert try_class(phase_recipe(recipe), {**LOADER, "config": config}).warnings == []


@pytest.mark.parametrize(
    ("attention", "bf16", "advice"),
    [
        ("auto", False, "Set training.bf16: true: then varlen attention"),
        ("auto", True, None),
        ("sdpa", True, "Set model.attn_implementation: auto: then varlen attention"),
        ("sdpa", False, "Set model.attn_implementation: auto and training.bf16: true: then varlen attention"),
    ],
)
def test_mask_of_a_long_pack_is_told_with_what_the_recipe_does_not_say_yet(
    attention: str, bf16: bool, advice: str | None
) -> None:
    """On a cluster `start` has no GPU, and training has one: by auto and bf16 it builds no mask."""
    model, training = {"attn_implementation": attention}, {"bf16": bf16}
    recipe = phase_recipe(tiny_recipe(model=model, training=training, packing={"max_length": 32_768}))
    told = try_class(recipe, {**LOADER, "config": LLAMA}, here=False).warnings
    assert len(told) == (advice is not None) and all(str(advice) in line for line in told)
    (on_cpu,) = try_class(recipe, {**LOADER, "config": LLAMA}).warnings
    assert (advice or "On a GPU varlen attention, which needs no mask") in on_cpu


def test_mask_of_a_class_without_varlen_is_told_without_such_advice() -> None:
    config = {**LLAMA, "model_type": "gemma2"}
    recipe = phase_recipe(
        tiny_recipe(model={"config": config}, training={"bf16": True}, packing={"max_length": 32_768})
    )
    (told,) = try_class(recipe, {**LOADER, "config": config}, here=False).warnings
    assert "varlen attention, which needs no mask, does not compute this model" in told and "training.bf16" not in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees this machine's GPU")
def test_gpu_that_torch_does_not_see_is_told_and_no_gpu_to_train_on() -> None:
    told = unseen_gpu(phase_recipe(tiny_recipe()))
    assert told is not None and "this machine has a GPU, and torch" in told and "sees none" in told
    sharded = phase_recipe(tiny_recipe(runtime={"distributed": "fsdp2"}))
    with pytest.raises(ValueError, match=r"runtime\.distributed: fsdp2: needs a GPU"):
        unseen_gpu(sharded)
    assert try_class(sharded, {**LOADER, "config": LLAMA}, here=False).warnings == [], "another machine trains"
