"""Runs recorded in a metadata service: what the Metaflow UI is given, and a service that is not there."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flows.conftest import RECIPE, Project

CARDS = {"tokenize", "mix", "pack", "train", "evaluate", "report"}
# metaflow-service v2.5.0, services/ui_backend_service/data/cache/utils.py: `artifact_value` gives what is smaller than
# MAX_S3_SIZE, 4 KB unless the service is told otherwise, and `cacheable_artifact_value` passes it through json.dumps.
UI_LIMIT = 4 * 1024


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def environment(url: str) -> dict[str, str]:
    return {"METAFLOW_DEFAULT_METADATA": "service", "METAFLOW_SERVICE_URL": url, "NO_PROXY": "127.0.0.1"}


@contextlib.contextmanager
def metadata_service(project: Project) -> Iterator[str]:
    """metaflow-local-service in the project's folder; its URL."""
    port = free_port()
    command = [sys.executable, "-m", "metaflow_local_service.daemon", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--metaflow-root", str(project.folder)],
        cwd=project.folder,
        env=project.environment,  # its HOME is the project's folder: the service keeps its state there
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + 60
    try:
        while True:
            with contextlib.suppress(OSError), opener.open(f"http://127.0.0.1:{port}/ping", timeout=5):
                break
            assert process.poll() is None and time.monotonic() < deadline, "the service does not start"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


LOOK = """
import json
from metaflow import DataArtifact, Flow, namespace
from metaflow.cards import get_cards
from metaflow.plugins.cards.exception import CardNotPresentException

def cards(task):
    try:
        return [card.type for card in get_cards(task)]
    except CardNotPresentException:
        return []

def displayed(artifact):
    try:
        return {"data": json.loads(json.dumps(artifact.data))}
    except (TypeError, ValueError) as error:
        return {"fault": str(error)}

def artifacts(task):
    # The whole list, as the UI reads it; metaflow-local-service does not give one by its name, which the client needs
    # for `task.successful` and for names with an underscore.
    listed = task._metaflow.metadata.get_object("task", "artifact", None, None, *task.path_components)
    found = [DataArtifact(_object=one, _parent=task, _metaflow=task._metaflow) for one in listed]
    return {one.id: {"size": one.size, **displayed(one)} for one in found}

namespace(None)
(run,) = Flow("SFTFlow")
tasks = [task for step in run for task in step]
print(json.dumps([
    {
        "step": task.path_components[2],
        "metadata": task.metadata_dict,
        "cards": cards(task),
        "artifacts": artifacts(task),
    }
    for task in tasks
]))
"""


@pytest.fixture(scope="module")
def recorded(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The tasks of a run recorded in a service, as the service tells them. What it would make is in the store."""
    project = Project(tmp_path_factory.mktemp("service"))
    shutil.copytree(finished.store, project.store)
    project.write(RECIPE)
    with metadata_service(project) as url:
        project.settings = environment(url)
        project.run("run")
        return json.loads(project.call([sys.executable, "-c", LOOK]))


@pytest.mark.long
def test_run_in_a_service_has_every_task_done_and_every_card(recorded: list[dict[str, Any]]) -> None:
    steps = [task["step"] for task in recorded]
    assert len(steps) == 14 and {"start", "end", *CARDS} <= set(steps)
    assert [task["step"] for task in recorded if task["metadata"].get("attempt_ok") != "True"] == []
    with_cards = [task["step"] for task in recorded if task["cards"]]
    assert set(with_cards) == CARDS and steps.count("tokenize") == with_cards.count("tokenize") == 2


@pytest.mark.long
def test_dag_of_the_ui_is_the_flows(recorded: list[dict[str, Any]]) -> None:
    (start,) = [task for task in recorded if task["step"] == "start"]
    dag = start["artifacts"]["_graph_info"]["data"]
    assert dag["steps"]["start"]["next"] == ["download"] and dag["steps"]["start"]["type"] == "split-foreach"
    assert set(dag["steps"]["train"]["next"]) == {"train", "evaluate_all"}
    assert {task["step"] for task in recorded} <= set(dag["steps"])
    assert all(dag["steps"][task["step"]]["doc"] for task in recorded)


@pytest.mark.long
def test_every_artifact_shows_in_the_ui(recorded: list[dict[str, Any]]) -> None:
    shown = [
        (f"{task['step']}.{name}", artifact)
        for task in recorded
        for name, artifact in task["artifacts"].items()
        if not name.startswith("_")
    ]
    assert {"start.pins", "tokenize.tokens", "train.trained", "report.scores"} <= {name for name, _ in shown}
    assert {name: artifact["fault"] for name, artifact in shown if "fault" in artifact} == {}
    assert [(name, artifact["size"]) for name, artifact in shown if artifact["size"] >= UI_LIMIT] == []


@pytest.mark.parametrize("command", ["run", "resume", "scores"])
def test_service_that_is_down_is_told_at_once(tmp_path: Path, command: str) -> None:
    project = Project(tmp_path)
    project.write(RECIPE)
    url = f"http://127.0.0.1:{free_port()}"
    project.settings = environment(url)
    began = time.monotonic()
    call = project.sft if command == "scores" else project.run
    output = call(command, succeeds=False)
    assert time.monotonic() - began < 12, "Metaflow's own retries take 15 s"
    assert f"METAFLOW_SERVICE_URL: found {url}, where no Metaflow metadata service answers (no connection)" in output
    assert "METAFLOW_DEFAULT_METADATA=local" in output and "Traceback" not in output
    assert not project.store.exists() and not (tmp_path / ".metaflow" / "SFTFlow").exists()


@pytest.mark.slow
def test_service_that_never_answers_is_told_too(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.write(RECIPE)
    with socket.socket() as listening:  # takes the connection, and says nothing
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        project.settings = environment(f"http://127.0.0.1:{listening.getsockname()[1]}")
        output = project.run("run", succeeds=False)
    assert "no answer within 5 s" in output and not project.store.exists()


@pytest.mark.slow
def test_service_of_the_profile_and_of_the_command_line_is_asked(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.write(RECIPE)
    (tmp_path / ".metaflowconfig").mkdir()  # HOME is the project's folder
    profile = {"METAFLOW_DEFAULT_METADATA": "service", "METAFLOW_SERVICE_URL": f"http://127.0.0.1:{free_port()}"}
    (tmp_path / ".metaflowconfig" / "config.json").write_text(json.dumps(profile))
    assert profile["METAFLOW_SERVICE_URL"] in project.run("run", succeeds=False)
    project.settings = {"METAFLOW_DEFAULT_METADATA": "local"}
    assert profile["METAFLOW_SERVICE_URL"] in project.run("--metadata", "service", "run", succeeds=False)
    # A command that writes no run asks no service.
    project.settings = {}
    assert "trained" in project.sft("plan", "recipe.yaml")
