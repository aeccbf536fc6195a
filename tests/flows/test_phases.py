"""Two phases in the flow, on two nodes, killed between them: it goes on, and scores every model on every task."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.flows.conftest import RECIPE, TIMEOUT_S, Project, names
from tests.flows.test_resuming import processes, wait_until

SECTIONS = ("dataset_mixture", "packing", "training")


def phased_recipe(num_nodes: int, store: str) -> dict:
    recipe = copy.deepcopy(RECIPE)
    keys = {name: recipe.pop(name) for name in SECTIONS}
    recipe["phases"] = {"mid": copy.deepcopy(keys), "sft": keys}
    for phase, dataset in zip(recipe["phases"].values(), keys["dataset_mixture"]["datasets"], strict=True):
        phase["dataset_mixture"] = {**phase["dataset_mixture"], "datasets": [dataset]}
    recipe["phases"]["mid"]["training"] |= {"loss_scope": "all", "max_steps": 6}
    recipe["evaluation"]["tasks"] = ["checksum_no_think"]  # of sft: rows that are trained whole ask for nothing
    recipe["runtime"] |= {"num_nodes": num_nodes, "store": store}
    return recipe


def num_trained(project: Project, phase: str) -> int:
    return names(project.builds())[f"trained {phase} 0"]


@pytest.mark.long
def test_two_phases_on_two_nodes_killed_between_them_go_on_and_are_scored(tmp_path: Path) -> None:
    """Behind a URL, where a node that waits for the first one's checkpoint has to list the bucket again."""
    project, url = Project(tmp_path), f"file://{tmp_path}/bucket"
    project.settings["SFT_CACHE"] = str(tmp_path / "cache")
    project.store = tmp_path / "cache" / hashlib.sha256(url.encode()).hexdigest()[:12]
    project.write(phased_recipe(num_nodes=2, store=url))
    run = project.start(project.command("run"))
    wait_until(lambda: num_trained(project, "mid") == 1 or run.poll() is not None, "the end of the first phase")
    assert run.poll() is None, (project.folder / "log.txt").read_text()[-3000:]
    assert num_trained(project, "sft") == 0
    os.killpg(run.pid, signal.SIGKILL)
    run.wait(TIMEOUT_S)
    wait_until(lambda: not processes(project, "sft_core.train.main"), "the orphaned trainer to end")

    output = project.call([sys.executable, "-m", "steps.cli.main", "resume"])
    assert max(names(project.builds()).values()) == 1, "nothing that was finished was built again"
    assert {"trained mid 0", "trained sft 0", "evaluated mid checksum_no_think"} <= {*names(project.builds())}
    assert "sft - base is the difference" in output and "mid loss" in output

    scores = json.loads(project.sft("scores", "--all", "--json"))
    assert all({"base", "mid", "sft"} <= {*row} for row in scores) and len(scores) > 1
    (release,) = (project.store / "release").iterdir()
    card = (release / "model" / "README.md").read_text()
    assert "### Phase mid" in card and "### Phase sft" in card and "What each phase changes" in card
    answers = [json.loads(line) for line in project.sft("answers", "latest", "--json").splitlines()]
    assert answers and {"base", "sft"} <= {*answers[0]["score"]}
    lineage = project.sft("lineage", "latest")
    assert "trained/" in lineage and lineage.count("packed/") == 2, "both phases are in the lineage"

    project.write(phased_recipe(num_nodes=1, store=url))  # where it runs changes nothing
    before = len(project.builds())
    project.run("run", "--set", "phases.sft.training.learning_rate=2e-3")
    added = names(project.builds()[before:])
    assert {name for name in added if name.startswith("trained")} == {"trained sft 0"}
    assert not any(name.startswith("evaluated mid") for name in added), "the first phase's scores are there"
