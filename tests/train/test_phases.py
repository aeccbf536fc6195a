"""Phases after each other: each starts from the weights of the one before; what did not change is not made again."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sft_core.pins.pinned import PinnedRecipe, pin
from sft_core.recipe.parse import parse_recipe
from sft_core.store.ref import Ref
from sft_core.store.store import Store
from steps.pack import PACKED
from steps.search import progress
from steps.train import CHECKPOINT, TRAINED, checkpoint_of
from tests.recipe.test_phases import phased_recipe


def ensure_all(store: Store, pinned: PinnedRecipe) -> PinnedRecipe:
    """Trains round after round, as the flow does."""
    for phase in pinned.recipe.phases:
        store.ensure(PACKED, pinned, **pinned.part_of(phase))
    num_rounds = 0
    while num_rounds < len((known := progress(store, pinned)).rounds):
        store.ensure(TRAINED, known.pinned, **known.rounds[num_rounds])
        num_rounds += 1
    return known.pinned


def built(store: Store) -> Counter[str]:
    lines = (store.root / "builds.jsonl").read_text().splitlines()
    return Counter(" ".join([build["stage"], *map(str, build["part"].values())]) for build in map(json.loads, lines))


def checkpoint(store: Store, pinned: PinnedRecipe, phase: str) -> Ref:
    stage, part = checkpoint_of(pinned, phase)
    return store.ensure(stage, pinned, **part)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, PinnedRecipe]:
    store = Store(tmp_path_factory.mktemp("phases"))
    return store, ensure_all(store, pin(parse_recipe(phased_recipe())))


def trained_alone(store: Store, data: dict[str, Any], start: Path) -> dict[str, torch.Tensor]:
    """The oracle: the second phase as a recipe of one phase, which starts from the first one's checkpoint."""
    model = {**data["model"], "model_name_or_path": str(start / "model")}
    del model["config"]
    alone = {**data, **data["phases"]["sft"], "model": model}
    del alone["phases"]
    return weights(store.path(store.ensure(TRAINED, pin(parse_recipe(alone)), round=0)))


def is_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_phase_starts_from_the_weights_of_the_one_before(chained: tuple[Store, PinnedRecipe], tmp_path: Path) -> None:
    store, pinned = chained
    first, second = (store.path(checkpoint(store, pinned, phase)) for phase in ("mid", "sft"))
    assert not is_equal(weights(first), weights(second))
    assert is_equal(weights(second), trained_alone(Store(tmp_path), phased_recipe(), first))


@pytest.mark.long
def test_a_phase_starts_from_merged_weights_with_the_added_tokens(tmp_path: Path) -> None:
    data = phased_recipe()
    data["model"]["add_special_tokens"] = ["<|note|>"]
    data["phases"]["mid"]["training"]["lora"] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    store = Store(tmp_path / "phases")
    pinned = ensure_all(store, pin(parse_recipe(data)))
    first, second = (store.path(checkpoint(store, pinned, phase)) for phase in ("mid", "sft"))
    assert "model.embed_tokens.weight" in weights(first) and not is_equal(weights(first), weights(second))
    assert len({len(weights(folder)["model.embed_tokens.weight"]) for folder in (first, second)}) == 1
    assert is_equal(weights(second), trained_alone(Store(tmp_path / "alone"), data, first))


@pytest.mark.slow
def test_a_changed_key_of_the_second_phase_trains_the_second_alone(chained: tuple[Store, PinnedRecipe]) -> None:
    store, _ = chained
    before = built(store)
    changed = pin(parse_recipe(phased_recipe(training={"learning_rate": 1e-3})))
    ensure_all(store, changed)
    assert dict(built(store) - before) == {"trained sft 0": 1}


@pytest.mark.long
def test_a_changed_key_of_the_first_phase_trains_both(chained: tuple[Store, PinnedRecipe]) -> None:
    store, _ = chained
    before = built(store)
    data = phased_recipe()
    data["phases"]["mid"]["training"]["learning_rate"] = 1e-3
    ensure_all(store, pin(parse_recipe(data)))
    assert dict(built(store) - before) == {"trained mid 0": 1, "trained sft 0": 1}


@pytest.mark.long
def test_a_search_in_the_second_phase_starts_from_the_first(tmp_path: Path) -> None:
    data = phased_recipe(search={"strategy": "sft", "evaluations_per_epoch": 1, "max_rows": 4})
    sft = data["phases"]["sft"]["training"]
    del sft["num_train_epochs"]
    data["phases"]["sft"]["search"]["epochs_per_rollout"] = 1.0
    sft["lr_scheduler_type"] = "constant"
    for phase in data["phases"].values():
        phase["dataset_mixture"]["selection_share"] = 0.2
    store = Store(tmp_path)
    pinned = pin(parse_recipe(data))
    known = progress(store, pinned)
    assert known.rounds == [{"phase": "mid", "round": 0}, {"phase": "sft", "round": 0}]
    pinned = ensure_all(store, pinned)
    assert progress(store, pinned).searches["sft"].is_over
    delivered = store.path(store.ensure(CHECKPOINT, pinned, phase="sft"))
    start = store.path(store.ensure(TRAINED, pinned, phase="mid", round=0))
    assert any(
        not torch.equal(*pair) for pair in zip(weights(start).values(), weights(delivered).values(), strict=True)
    )
    journal = json.loads((store.path(store.ensure(TRAINED, pinned, phase="sft", round=0)) / "curves.json").read_text())
    assert journal, "it measured its selection rows"
