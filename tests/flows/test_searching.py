"""A search in the flow, killed at its transitions: it goes on to the same decisions and the same weights."""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_core.pins.pinned import pin
from sft_core.recipe.parse import parse_recipe
from sft_core.rounds import ONLY
from sft_core.store.ref import Ref
from sft_core.store.store import Store
from steps.search import Searched, progress
from steps.train import CHECKPOINT
from tests.flows.conftest import RECIPE, TIMEOUT_S, Project, names
from tests.flows.test_resuming import processes, wait_until

SAVE_STEPS = 3


def search_recipe() -> dict:
    recipe = copy.deepcopy(RECIPE)
    recipe["dataset_mixture"]["selection_share"] = 0.2
    del recipe["training"]["max_steps"]
    recipe["training"] |= {"learning_rate": 0.02, "lr_scheduler_type": "constant"}
    recipe["search"] = {"strategy": "msft", "preset": "paper", "epochs_per_rollout": 2.0, "evaluations_per_epoch": 2}
    recipe["search"] |= {"max_rows": 10, "max_rollouts": 2}
    recipe["runtime"]["save_steps"] = SAVE_STEPS
    return recipe


def found_in(project: Project) -> tuple[Searched, list[Path], bytes]:
    """The search as the project's store tells it, the folder of each roll-out, and the weights that are delivered."""
    store = Store(project.store)
    found = progress(store, pin(parse_recipe(search_recipe()))).searches[ONLY]
    trained = [build for build in project.builds() if build["stage"] == "trained"]
    built = {build["part"]["round"]: Ref(*build["ref"].split("/")) for build in trained}
    located = store.locate(CHECKPOINT, found.pinned, {})
    assert located.status == "hit" and located.ref is not None
    weights = store.path(located.ref) / "model" / "model.safetensors"
    return found, [store.path(built[round]) for round in sorted(built)], weights.read_bytes()


def is_in_rollout(project: Project, num_done: int) -> bool:
    """Whether the next roll-out is at work and has something to go on from: a checkpoint, weights of an evaluation."""
    at_work = [path for path in project.store.glob(".partial/trained-*") if any(path.glob("checkpoints/checkpoint-*"))]
    return num_trained(project) == num_done and any(any(path.glob("evaluations/*")) for path in at_work)


def num_trained(project: Project) -> int:
    return sum(count for name, count in names(project.builds()).items() if name.startswith("trained "))


def kill(project: Project, run: subprocess.Popen, when: Callable[[], bool], what: str) -> None:
    """Kills all of the run's process group, the scheduler and its tasks, and waits for what they leave to end."""
    wait_until(lambda: when() or run.poll() is not None, what)
    assert run.poll() is None, f"it ended before {what}:\n" + (project.folder / "log.txt").read_text()[-3000:]
    os.killpg(run.pid, signal.SIGKILL)
    run.wait(TIMEOUT_S)
    wait_until(lambda: not processes(project, "sft_core.search.main"), "the orphaned trainer to end")


@pytest.mark.long
def test_search_killed_at_its_transitions_decides_and_delivers_the_same(tmp_path: Path) -> None:
    project, whole = Project(tmp_path / "killed"), Project(tmp_path / "whole")
    for one in (project, whole):
        one.folder.mkdir()
        one.write(search_recipe())
    uninterrupted = whole.start(whole.command("run"))
    transitions = [
        (lambda: is_in_rollout(project, 0), "a checkpoint of the first roll-out"),
        (lambda: num_trained(project) == 1, "the end of the first roll-out"),
        (lambda: is_in_rollout(project, 1), "a checkpoint of the second roll-out"),
        (lambda: num_trained(project) == 2, "the end of the search"),
    ]
    command = project.command("run")
    for when, what in transitions:
        kill(project, project.start(command), when, what)
        command = [sys.executable, "-m", "steps.cli.main", "resume"]
    assert "exact_match" in project.sft("resume")
    assert uninterrupted.wait(TIMEOUT_S) == 0, (whole.folder / "log.txt").read_text()[-3000:]

    assert max(names(project.builds()).values()) == 1, "nothing that was finished was built again"
    (found, folders, weights), (expected, expected_folders, expected_weights) = found_in(project), found_in(whole)
    decisions = [one.decision for one in expected.measured]
    assert len(decisions) == 2 and any(decision.dropped for decision in decisions), "nothing was decided"
    assert [one.decision for one in found.measured] == decisions
    assert found.rounds.best == expected.rounds.best
    assert weights == expected_weights
    for folder, expected_folder in zip(folders, expected_folders, strict=True):
        assert (folder / "curves.json").read_bytes() == (expected_folder / "curves.json").read_bytes()
        log = (folder / "logs" / "train.log").read_text()
        assert "resume checkpoint=" in log, "it was killed on its way, and went on from where it was"
        steps = re.findall(r"^step=(\d+)/\d+ loss=", log, re.MULTILINE)
        assert len(steps) > 0 and len(steps) - len({*steps}) <= SAVE_STEPS, steps
