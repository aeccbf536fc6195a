"""Phases of a recipe: how they are written, and what a part, a plan and a key make of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from sft_core.pins.pinned import pin
from sft_core.recipe.parse import parse_recipe
from sft_core.rounds import ONLY
from sft_core.store.stage import Located
from sft_core.store.store import Store
from steps.plan import differences, plan
from steps.train import TRAINED
from tests.train.tiny import QUICKSTART, tiny_recipe


def phased_recipe(**changes: Any) -> dict[str, Any]:
    """The tiny recipe in two phases: mid trains all tokens of one source, sft the answers of the other."""
    data = tiny_recipe()
    keys = {name: data.pop(name) for name in ("dataset_mixture", "packing", "training")}
    data["phases"] = {"mid": copy.deepcopy(keys), "sft": copy.deepcopy(keys)}
    for phase, source in zip(data["phases"].values(), ("copy_no_think", "checksum_think"), strict=True):
        phase["dataset_mixture"]["datasets"] = [{"path": str(QUICKSTART / f"{source}.jsonl")}]
    data["phases"]["mid"]["training"] |= {"loss_scope": "all", "num_train_epochs": 1}
    data["phases"]["sft"]["training"] |= {"num_train_epochs": 2}
    for name, values in changes.items():
        data["phases"]["sft"].setdefault(name, {}).update(values)
    return data


def names(planned: list[Located]) -> set[str]:
    return {f"{located.stage.name} {located.name}" for located in planned}


def test_recipe_without_phases_is_that_of_one(tmp_path):
    data = tiny_recipe()
    whole = parse_recipe(data)
    keys = {name: data.pop(name) for name in ("dataset_mixture", "packing", "training")}
    assert parse_recipe({**data, "phases": {ONLY: keys}}) == whole
    assert whole.models == ["base", "tuned"]
    assert {*whole.as_written()} >= {"dataset_mixture", "packing", "training", "search"}
    renamed = parse_recipe({**data, "phases": {"sft": keys}})
    store = Store(tmp_path)
    parts = [located.part for located in plan(store, pin(renamed))]
    assert parts and not any("phase" in part for part in parts), "a name of the only phase is in no key of training"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(training={}), "training: found beside phases; each phase has its own"),
        (lambda data: data["phases"].clear(), "phases: found"),
        (lambda data: data["phases"]["mid"].pop("dataset_mixture"), "phases.mid.dataset_mixture: missing"),
        (lambda data: data["phases"]["sft"].update(trainig={}), r"phases.sft.trainig: unknown key.*training"),
        (
            lambda data: data["phases"]["sft"]["training"].update(learning_rat=1),
            r"phases.sft.training.learning_rat: unknown key.*learning_rate",
        ),
        (
            lambda data: data["phases"]["sft"]["packing"].update(max_length=1),
            r"phases.sft.packing.max_length: found 1; a pack holds",
        ),
        (
            lambda data: (
                data["phases"]["sft"]["training"].update(global_batch_size=3) or data["runtime"].update(num_processes=2)
            ),
            r"phases.sft.training.global_batch_size: found 3",
        ),
        (
            lambda data: data["phases"]["sft"]["dataset_mixture"].update(report_share=0.1),
            r"phases.sft.dataset_mixture.report_share: found 0.1, and 0.3 in the first phase",
        ),
        (
            lambda data: data["phases"]["sft"].update(dataset_mixture=data["phases"]["mid"]["dataset_mixture"]),
            "phases: found the source 'copy_no_think' in several",
        ),
        (lambda data: data["phases"].update(base=data["phases"].pop("sft")), "phases.base: the name is taken"),
        (lambda data: data["phases"].update(flags=data["phases"].pop("sft")), "phases.flags: the name is taken"),
    ],
)
def test_wrong_phases_are_told_by_their_keys(change, message: str):
    data = phased_recipe()
    change(data)
    with pytest.raises(ValueError, match=message):
        parse_recipe(data)


def test_keys_at_the_root_are_told_as_they_are_written():
    data = tiny_recipe(packing={"max_length": 1})
    with pytest.raises(ValueError, match=r"^packing\.max_length: found 1"):
        parse_recipe(data)
    data = tiny_recipe()
    data["trainig"] = data.pop("training")
    with pytest.raises(ValueError, match=r"^trainig: unknown key.*training"):
        parse_recipe(data)
    del data["dataset_mixture"]
    with pytest.raises(ValueError, match=r"(?m)^dataset_mixture: missing"):
        parse_recipe(data)


def test_plan_of_phases_has_the_outputs_of_each(tmp_path):
    planned = plan(Store(tmp_path), pin(parse_recipe(phased_recipe())))
    for phase, source in (("mid", "copy_no_think"), ("sft", "checksum_think")):
        assert {f"mixture {phase}", f"packed {phase}", f"trained {phase},0", f"tokens {source}"} <= names(planned)
    models, tasks = ("base", "mid", "sft"), ("copy_no_think", "checksum_think")
    assert {f"evaluated {model},{task}" for model in models for task in tasks} <= names(planned)


def test_training_of_a_later_phase_depends_on_the_checkpoint_before_and_not_on_the_start_model(tmp_path):
    recipe = parse_recipe(phased_recipe())
    pinned = pin(recipe)
    assert "start model" not in TRAINED.needs(pinned, {"phase": "mid", "round": 0})
    stage, part = TRAINED.needs(pinned, {"phase": "sft", "round": 0})["start model"]
    assert (stage, part) == (TRAINED, {"phase": "mid", "round": 0})
    mid, sft = (TRAINED.section(pinned, {"phase": phase, "round": 0})["job"] for phase in ("mid", "sft"))
    assert mid["model"]["config"] == recipe.model.config and sft["model"]["config"] is None
    assert mid["training"]["num_train_epochs"] == 1 and sft["training"]["num_train_epochs"] == 2
    other = pin(parse_recipe(phased_recipe(training={"learning_rate": 1e-3})))
    assert TRAINED.section(other, {"phase": "mid", "round": 0})["job"] == mid
    changed = TRAINED.section(other, {"phase": "sft", "round": 0})["job"]
    assert [key for key, _, _ in differences(sft, changed)] == ["training.learning_rate"]


def test_set_reaches_a_key_of_a_phase_and_a_source_in_it():
    from sft_core.recipe.parse import override

    data = override(
        phased_recipe(),
        ("phases.sft.training.learning_rate=0.5", "phases.mid.dataset_mixture.datasets.copy_no_think.weight=0.25"),
    )
    recipe = parse_recipe(data)
    assert recipe.phases["sft"].training.learning_rate == 0.5
    assert recipe.dataset("copy_no_think").weight == 0.25
