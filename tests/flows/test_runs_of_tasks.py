"""Runs of an older flow, which evaluated each task in a step of its own: they are read, and started anew."""

from __future__ import annotations

import copy
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from sft_core.recipe.parse import override, parse_recipe
from steps.runs.older import options, steps_of
from steps.runs.recorded import Beginning
from tests.flows.conftest import RECIPE, ROOT, Project, names
from tests.flows.test_failing_tasks import recipe_with_tasks


def run_of_tasks(project: Project, succeeds: bool = True) -> str:
    flow = ROOT / "tests" / "flows" / "flow_of_tasks.py"
    return project.call([sys.executable, str(flow), "--config", "recipe", "recipe.yaml", "run"], succeeds=succeeds)


LOOK = """
from metaflow import Flow, namespace

namespace(None)
for run in Flow("SFTFlow"):
    print(run.id, *sorted(task.data.task if hasattr(task.data, "task") else "-" for task in run["evaluate"]))
"""


@pytest.mark.long
def test_run_of_tasks_is_looked_back_at_as_any_other(finished: Project, tmp_path: Path) -> None:
    project = Project(tmp_path)
    shutil.copytree(finished.store, project.store)
    recipe = copy.deepcopy(RECIPE)
    recipe["evaluation"]["tasks"] = ["checksum_think", "checksum_no_think"]
    project.write(recipe)
    assert "exact_match" in run_of_tasks(project)
    built = len(project.builds())
    project.run("run")
    assert len(project.builds()) == built, "the outputs are the same"
    (of_shares, *shares), (of_tasks, *tasks) = (
        line.split() for line in project.call([sys.executable, "-c", LOOK]).splitlines()
    )
    assert (tasks, shares) == (["checksum_no_think", "checksum_think"], ["-", "-"]), "the runs have these shapes"

    found = [
        [json.loads(line) for line in project.sft("answers", run, "--json").splitlines()]
        for run in (of_tasks, of_shares)
    ]
    assert found[0] == found[1] and len(found[0]) == 16
    assert list(dict.fromkeys(row["task"] for row in found[0])) == recipe["evaluation"]["tasks"]
    compared = json.loads(project.sft("compare", of_tasks, of_shares, "--json"))
    assert compared["recipe"] == [] and {row["task"] for row in compared["scores"]} == {*recipe["evaluation"]["tasks"]}
    assert all(row["difference"]["value"] == 0 for row in compared["scores"] if row["metric"] == "loss")
    traced = [json.loads(project.sft("lineage", run, "--json")) for run in (of_tasks, of_shares)]
    assert traced[0] == traced[1]


@pytest.mark.long
def test_older_run_is_not_resumed_but_its_recipe_started_anew(tmp_path: Path) -> None:
    project, broken = Project(tmp_path), tmp_path / "broken"
    recipe = recipe_with_tasks(tmp_path / "tasks", broken)
    recipe["evaluation"]["lm_eval"]["tasks"] = ["raises"]
    project.write(recipe)
    broken.touch()
    output = run_of_tasks(project, succeeds=False)
    assert "lm_eval:raises: the judge is away" in output and "checksum_think" in output
    before = len(project.builds())
    broken.unlink()

    output = project.sft("resume", succeeds=False)
    assert "is of an older flow, with a step 'fan_out' that this one lacks" in output and "Traceback" not in output
    words = shlex.split(output.strip().splitlines()[-1].partition("found again: ")[2])
    assert words[:5] == ["python", "flows/sft_flow.py", "--config", "recipe", "RECIPE"]
    project.run(*words[5:])
    assert "lm_eval:raises" in project.sft("scores", "--json")
    built = {name for name in names(project.builds()[before:]) if not name.startswith(("report", "release"))}
    assert built == {f"harness {model} raises" for model in ("base", "tuned")}


def test_new_run_begins_with_the_older_ones_commits_and_options(small_recipe: dict[str, Any]) -> None:
    small_recipe["model"] = {"model_name_or_path": "org/model"}
    small_recipe["dataset_mixture"]["datasets"] += [
        {"id": "org/chat", "name": "chat", "revision": "v1"},
        {"id": "org/pinned", "name": "pinned", "revision": "c" * 40},
    ]
    recipe = parse_recipe(small_recipe)
    pins = {
        "model": "a" * 40,
        "sources": dict.fromkeys(recipe.sources, "file") | {"chat": "b" * 40, "pinned": "c" * 40},
    }
    new = options(Beginning(recipe, pins, ["training.seed=3"], 20))
    assert new == [
        *("--set", "training.seed=3", "--set", f"model.model_revision={'a' * 40}"),
        *("--set", f"dataset_mixture.datasets.chat.revision={'b' * 40}", "--limit", "20"),
    ]
    overrides = tuple(new[1:-2:2])
    anew = parse_recipe(override(small_recipe, overrides))
    assert anew.dataset("chat").revision == "b" * 40 and anew.model.model_revision == "a" * 40


def test_steps_of_the_flow_are_read_off_its_source() -> None:
    steps = steps_of(ROOT / "flows" / "sft_flow.py")
    assert {"start", "train_on_nodes", "evaluate_all", "end"} <= steps and "train_round" not in steps
