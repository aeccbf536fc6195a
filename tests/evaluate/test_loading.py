"""The model that is scored: in which dtype it is read, how often, and that tasks leave it as it was."""

from __future__ import annotations

import dataclasses
import json
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sft_core.evaluate.loading import (
    ModelToScore,
    ScoredModel,
    keeping_a_model,
    load_scored,
    scored_model,
)
from sft_core.evaluate.rows import read_rows
from sft_core.pins.pinned import PinnedRecipe, pin
from sft_core.recipe.parse import parse_recipe
from sft_core.store.store import Store
from sft_core.train.job import ModelLoader, TokenizerLoader
from sft_core.train.models import model as loader
from sft_core.train.models.model import load_model, save_checkpoint
from steps.evaluate import EVALUATED
from steps.harness import HARNESS
from steps.tokenize import TOKENS
from tests.evaluate.test_evaluated import TASK, evaluate_checkpoint
from tests.evaluate.test_harness import WORDS, WRITE
from tests.train.tiny import SOURCES, tiny_recipe

SEED = 3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


def pinned_with(**changes: dict[str, Any]) -> PinnedRecipe:
    return pin(parse_recipe(tiny_recipe(**changes)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A start model in a folder, its weights in float32."""
    pinned = pinned_with()
    model, tokenizer = load_model(
        ModelLoader(**pinned.model_loader), TokenizerLoader(**pinned.tokenizer_loader), seed=0
    )
    save_checkpoint(model, tokenizer, None, found := tmp_path_factory.mktemp("start"))
    return found


def start_model(pinned: PinnedRecipe) -> ModelToScore:
    model, tokenizer = ModelLoader(**pinned.model_loader), TokenizerLoader(**pinned.tokenizer_loader)
    return ModelToScore(model, tokenizer, None, "sdpa", bf16=False, seed=SEED)


def checkpoint(pinned: PinnedRecipe, trained: Path) -> ModelToScore:
    return dataclasses.replace(start_model(pinned), start=None, trained=trained)


def tensors(network: Any) -> dict[str, torch.Tensor]:
    """Weights, and what is computed from the config."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def assert_same(found: Any, expected: dict[str, torch.Tensor]) -> None:
    assert {"model.rotary_emb.inv_freq", "model.norm.weight"} <= expected.keys()
    assert {name: values.dtype for name, values in tensors(found).items()} == {
        name: values.dtype for name, values in expected.items()
    }
    assert [name for name, values in tensors(found).items() if not torch.equal(values, expected[name])] == []


def test_scored_in_bfloat16_a_file_is_read_as_it_is_served(folder: Path) -> None:
    pinned = pinned_with()
    model = ModelLoader(**{**pinned.model_loader, "path": str(folder), "config": None})
    network, _ = load_scored(model, TokenizerLoader(**pinned.tokenizer_loader), bf16=True, seed=SEED)
    served = tensors(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
    assert served["model.rotary_emb.inv_freq"].dtype == torch.float32
    assert served["model.norm.weight"].dtype == torch.bfloat16
    assert_same(network, served)
    assert not network.training


@pytest.mark.parametrize("grows", [False, True])
def test_scored_in_bfloat16_random_numbers_are_those_that_training_starts_from(folder: Path, grows: bool) -> None:
    """Of a whole model, or of the rows of tokens that a start model does not know."""
    pinned = pinned_with(model={"add_special_tokens": ["<x>", "<y>"]} if grows else {})
    model = {**pinned.model_loader, **({"path": str(folder), "config": None} if grows else {})}
    trained, _ = load_model(ModelLoader(**model), TokenizerLoader(**pinned.tokenizer_loader), seed=SEED)
    assert trained.dtype == torch.float32
    expected = {
        name: values if "inv_freq" in name else values.to(torch.bfloat16) for name, values in tensors(trained).items()
    }
    tokenizer = TokenizerLoader(**pinned.tokenizer_loader)
    network, vocabulary = load_scored(ModelLoader(**model), tokenizer, bf16=True, seed=SEED)
    assert network.get_input_embeddings().num_embeddings == len(vocabulary) == (293 if grows else 291)
    assert_same(network, expected)


@pytest.mark.slow
def test_scored_in_bfloat16_the_start_model_and_its_checkpoint_are_the_same(store: Store, tmp_path: Path) -> None:
    pinned = pinned_with(training={"bf16": True}, evaluation={"max_rows": 12, "max_new_tokens_by_task": {TASK: 5}})
    ref = store.ensure(EVALUATED, pinned, model="base", task=TASK)
    start = {**pinned.model_loader, "dtype": "float32"}
    model, tokenizer = load_model(
        ModelLoader(**start), TokenizerLoader(**pinned.tokenizer_loader), seed=pinned.recipe.last_phase.training.seed
    )
    save_checkpoint(model, tokenizer, pinned.template_text, tmp_path / "trained" / "model")
    tokens = store.path(store.ensure(TOKENS, pinned, source=TASK))
    rows = evaluate_checkpoint(pinned, tokens, tmp_path / "trained", tmp_path / "out")
    assert rows.equals(read_rows(store.path(ref)))


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[Any]]]:
    """Those that are loaded, one after another; the one before must be gone by then."""
    found: list[weakref.ref[Any]] = []
    load = loader.load_model

    def noted(*loaders: Any, **arguments: Any) -> Any:
        assert [one for one in found if one() is not None] == [], "two models at once"
        network, tokenizer = load(*loaders, **arguments)
        found.append(weakref.ref(network))
        return network, tokenizer

    monkeypatch.setattr(loader, "load_model", noted)
    yield found


@pytest.fixture
def harness_task(tmp_path: Path) -> dict[str, Any]:
    """An lm-eval task that asks for answers, as a part of the recipe."""
    (tmp_path / "words.jsonl").write_text("".join(json.dumps({"word": word}) + "\n" for word in WORDS))
    (tmp_path / "write_word.yaml").write_text(WRITE.format(data=tmp_path / "words.jsonl"))
    return {"lm_eval": {"tasks": ["write_word"], "include_path": str(tmp_path)}}


def num_loads(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.getMessage().startswith("loaded=") for record in caplog.records)


@pytest.mark.slow
def test_kept_model_is_loaded_once_for_all_tasks_and_none_changes_anothers_scores(
    harness_task: dict[str, Any],
    networks: list[weakref.ref[Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    data = tiny_recipe(evaluation={"max_rows": 6, "max_new_tokens": 6, **harness_task})
    data["model"]["attn_implementation"] = "eager"
    pinned, kept, alone = pin(parse_recipe(data)), Store(tmp_path / "kept"), Store(tmp_path / "alone")
    scorings = [(EVALUATED, SOURCES[0]), (HARNESS, "write_word"), (EVALUATED, SOURCES[1])]
    with keeping_a_model():
        found, own = [], None
        for stage, task in scorings:
            found.append(kept.ensure(stage, pinned, model="base", task=task))
            network = networks[0]()
            own = own or network.generation_config
            assert network.generation_config is own and network.config._attn_implementation == "eager"
            del network
        assert num_loads(caplog) == len(networks) == 1
    expected = [alone.ensure(stage, pinned, model="base", task=task) for stage, task in scorings]
    assert num_loads(caplog) == 1 + 3
    contents = [[store.manifest(ref)["content"] for ref in refs] for store, refs in ((kept, found), (alone, expected))]
    assert contents[0] == contents[1]


@pytest.mark.slow
def test_kept_model_is_let_go_before_another_is_loaded(networks: list[weakref.ref[Any]], folder: Path) -> None:
    pinned = pinned_with()
    (folder / "model").symlink_to(folder, target_is_directory=True)
    with keeping_a_model():
        for is_start, count in ((True, 1), (True, 1), (False, 2), (False, 2), (True, 3)):
            with scored_model(start_model(pinned) if is_start else checkpoint(pinned, folder)) as loaded:
                assert isinstance(loaded, ScoredModel) and loaded.network is not None
            assert len(networks) == count and networks[-1]() is not None
            del loaded
    assert networks[-1]() is None, "nothing is kept any more"
    with scored_model(start_model(pinned)) as loaded:
        assert loaded.network is not None
    del loaded
    assert len(networks) == 4 and networks[-1]() is None, "nothing is kept where nobody asked for it"


def test_model_that_fails_to_load_is_loaded_anew_by_the_next_task(tmp_path: Path) -> None:
    pinned = pinned_with()
    tuned = checkpoint(pinned, tmp_path)
    with keeping_a_model():
        with pytest.raises(OSError), scored_model(tuned) as loaded:
            _ = loaded.network
        model, tokenizer = load_model(
            ModelLoader(**pinned.model_loader), TokenizerLoader(**pinned.tokenizer_loader), seed=0
        )
        save_checkpoint(model, tokenizer, None, tmp_path / "model")
        with scored_model(tuned) as loaded:
            assert loaded.facts.context == 512 and loaded.facts.stops == [tokenizer.eos_token_id]
