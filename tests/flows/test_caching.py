"""What a change rebuilds, counted in the real flow."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path

import pytest

from sft_core.store.provenance import source_code, source_label
from tests.flows.conftest import DATA, RECIPE, ROOT, Project, names
from tests.report.columns import HEADER

pytestmark = pytest.mark.slow

BRANCH = ("conversations", "rendered", "tokens")
TRAINED_ON = {
    "trained 0": 1,
    "evaluated tuned checksum_think": 1,
    "report": 1,
    "release": 1,
}
MIXED_ON = {"mixture": 1, "packed": 1, **TRAINED_ON}


def changed(project: Project, *arguments: str, recipe: dict | None = None) -> dict[str, int]:
    """What a run with a change builds."""
    before = len(project.builds())
    if recipe is not None:
        project.write(recipe, "changed.yaml")
    project.run("run", *arguments, recipe="changed.yaml" if recipe else "recipe.yaml")
    return dict(names(project.builds()[before:]))


def planned(project: Project, *arguments: str, recipe: str = "recipe.yaml") -> dict[str, int]:
    """What a run would build, by `sft plan`: without running it."""
    stages = json.loads(project.sft("plan", recipe, "--json", *arguments))
    missing = [stage for stage in stages if stage["status"] != "hit"]
    return {f"{stage['stage']} {stage['name']}".replace(",", " ").removesuffix(" -"): 1 for stage in missing}


def test_first_run_builds_everything_once_and_prints_the_table(finished: Project) -> None:
    branches = {f"{stage} {source}": 1 for stage in BRANCH for source in ("checksum_think", "checksum_no_think")}
    first = names(finished.builds()[: len(branches) + len(MIXED_ON) + 2])
    assert dict(first) == {"verdict": 1, **branches, **MIXED_ON, "evaluated base checksum_think": 1}
    assert "exact_match" in finished.first_output
    scores = json.loads(finished.sft("scores", "--json"))
    assert {row["metric"] for row in scores} == {"loss", "perplexity", "token_accuracy", "exact_match"}
    assert set(scores[0]) == set(HEADER)


def test_run_is_tagged_with_its_recipe_model_and_commit(finished: Project) -> None:
    code = (
        "from metaflow import Flow, namespace; namespace(None); print(*list(Flow('SFTFlow'))[-1].user_tags, sep='\\n')"
    )
    found = set(finished.call([sys.executable, "-c", code]).splitlines())
    expected = {"recipe:small", "model:random llama"}
    if (source := source_code())["commit"] is not None:
        expected.add(f"commit:{source_label(source)}")
    assert found == expected


def test_second_run_and_runtime_changes_build_nothing(finished: Project) -> None:
    recipe = copy.deepcopy(RECIPE)
    recipe["runtime"] |= {"save_steps": 3, "eval_batch_size": 3, "logging_steps": 2}
    assert changed(finished, recipe=recipe) == {}


@pytest.mark.long
def test_run_hands_over_no_damaged_release(finished: Project) -> None:
    weights = next(finished.store.glob("release/*/model/model.safetensors"))
    whole = weights.read_bytes()
    weights.unlink()  # it may be a link to the training's
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    told = finished.call(finished.command("run"), succeeds=False)
    assert f"release/{weights.parts[-3]}: model/model.safetensors has" in told
    weights.write_bytes(whole)


def test_learning_rate_rebuilds_training_and_on(finished: Project) -> None:
    assert planned(finished, "--set", "training.learning_rate=2e-3") == TRAINED_ON


@pytest.mark.long
def test_weight_and_one_more_source_rebuild_the_mixture_and_on_but_no_tokens(finished: Project) -> None:
    recipe = copy.deepcopy(RECIPE)
    recipe["dataset_mixture"]["datasets"][0]["weight"] = 0.5
    finished.write(recipe, "weight.yaml")
    assert planned(finished, recipe="weight.yaml") == MIXED_ON
    recipe["dataset_mixture"]["datasets"].append({"name": "copy", "path": str(DATA / "copy_no_think.jsonl")})
    expected = {**{f"{stage} copy": 1 for stage in BRANCH}, **MIXED_ON}
    finished.write(recipe, "changed.yaml")
    assert planned(finished, recipe="changed.yaml") == expected
    assert changed(finished, recipe=recipe) == expected


@pytest.fixture
def copied(finished: Project, tmp_path: Path) -> Project:
    """The same project, with code of its own to change."""
    for name in ("flows", "steps", "sft_core", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.jsonl"))
    return Project(finished.folder, tmp_path)


@pytest.mark.long
def test_changed_module_rebuilds_its_stage_and_a_comment_nothing(copied: Project) -> None:
    module = copied.source / "sft_core" / "data" / "mixing" / "mixture.py"
    module.write_text("# A comment changes nothing.\n" + module.read_text())
    assert planned(copied) == {}
    with module.open("a") as file:
        file.write("_build = build_mixture\n\n\ndef build_mixture(build, **section):\n")
        file.write('    return {**_build(build, **section), "extra": 1}\n')
    # The counts changed and the rows did not: nothing after the mixture is made again.
    assert changed(copied) == {"mixture": 1}
