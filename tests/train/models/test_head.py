"""The tiled head that a GPU takes, forced here on a CPU: the plain one's numbers, or the plain one."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from trl.kernels import ChunkedLogProbFunction

from sft_core.train import tried_forward
from sft_core.train.loss import Forward
from sft_core.train.models.head import add_fused_head, takes_fused_head
from sft_core.train.models.small import one_thread, small_model
from sft_core.train.probe import check_head
from tests.train.models.test_lora import check_merged
from tests.train.models.test_lora import recipe as recipe_with_added_token
from tests.train.tiny import LLAMA, Run, tiny_recipe


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tried_forward, "wants_fused_head", lambda device: True)


def how_it_ran(run: Run) -> dict[str, Any]:
    return json.loads((run.folder / "logs" / "forward.jsonl").read_text())


def assert_same_training(found: Run, expected: Run) -> None:
    for of_found, of_expected in zip(found.events, expected.events, strict=True):
        assert of_found["loss"] == pytest.approx(of_expected["loss"], rel=1e-5)
        assert of_found["grad_norm"] == pytest.approx(of_expected["grad_norm"], rel=1e-4)
    weights, others = (load_file(run.model / "model.safetensors") for run in (found, expected))
    torch.testing.assert_close(weights, others, atol=5e-5, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("forced")
def test_training_with_the_fused_head_is_training_with_the_plain_one(
    plain_run: Run, train_here: Callable[..., Run]
) -> None:
    run = train_here(tiny_recipe())
    assert how_it_ran(run)["fused_head"] and not how_it_ran(plain_run)["fused_head"]
    assert_same_training(run, plain_run)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_lora_with_added_tokens_takes_the_plain_head_and_trains_their_rows(
    tied: bool, train_here: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_with_added_token(tmp_path, tied=tied, lora_dropout=0.0)
    plain = train_here(recipe)
    monkeypatch.setattr(tried_forward, "wants_fused_head", lambda device: True)
    forced = train_here(recipe)
    assert not how_it_ran(forced)["fused_head"], "PEFT wraps this head: its bare weight is the frozen one"
    assert_same_training(forced, plain)
    check_merged(forced)


@pytest.mark.slow
@pytest.mark.usefixtures("forced")
def test_lora_without_added_tokens_takes_the_fused_head(train_here: Callable[..., Run]) -> None:
    lora = {"training": {"lora": {"r": 4}, "max_steps": 6}}
    run = train_here(tiny_recipe(model={"config": {**LLAMA, "tie_word_embeddings": False}}, **lora))
    assert how_it_ran(run)["fused_head"]
    assert run.events[-1]["loss"] < run.events[0]["loss"]


def test_head_asks_its_kernel_for_likelihoods_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it computes the entropy and the likeliest token of each tile, which nobody reads."""
    asked: list[tuple[object, ...]] = []
    apply = ChunkedLogProbFunction.apply

    def noted(*args: Any) -> Any:
        bound = inspect.signature(ChunkedLogProbFunction.forward).bind(None, *args)
        bound.apply_defaults()
        asked.append(bound.arguments["outputs"])
        return apply(*args)

    monkeypatch.setattr(ChunkedLogProbFunction, "apply", noted)
    with one_thread():
        model = small_model(AutoConfig.for_model("llama"), attention=None, trust_remote_code=False)
        add_fused_head(model)
        assert check_head(model, Forward(), device="cpu", exact=True)
    assert asked == [()]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "cohere", "smollm3", "olmoe"])
def test_head_of_a_class_that_changes_its_logits_is_its_own(kind: str) -> None:
    with one_thread():
        model = small_model(AutoConfig.for_model(kind), attention=None, trust_remote_code=False)
        assert takes_fused_head(model)
        add_fused_head(model)
        assert check_head(model, Forward(), device="cpu", exact=True)


@pytest.mark.parametrize("name", ["logit_scale", "final_logit_softcapping"])
def test_head_that_does_more_than_is_known_is_found(name: str) -> None:
    with one_thread():
        model = small_model(AutoConfig.for_model("llama"), attention=None, trust_remote_code=False)
        setattr(model.config, name, 0.5)  # which the class itself does not know
        add_fused_head(model)
        assert not check_head(model, Forward(), device="cpu", exact=True)
