"""Runs that were recorded when each task was evaluated in a step of its own are read, and resumed."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path

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


def test_failed_tasks_of_a_run_of_tasks_are_scored_by_a_resume(tmp_path: Path) -> None:
    project, broken = Project(tmp_path), tmp_path / "broken"
    recipe = recipe_with_tasks(tmp_path / "tasks", broken)
    recipe["evaluation"]["lm_eval"]["tasks"] = ["raises"]
    project.write(recipe)
    broken.touch()
    output = run_of_tasks(project, succeeds=False)
    assert "lm_eval:raises: the judge is away" in output and "checksum_think" in output
    before = len(project.builds())
    broken.unlink()
    output = project.sft("resume")
    assert "evaluating lm_eval:raises again" in output and "lm_eval:raises" in project.sft("scores", "--json")
    assert {name for name in names(project.builds()[before:]) if name.startswith(("harness", "evaluated"))} == {
        f"harness {model} raises" for model in ("base", "tuned")
    }
