"""Killed runs go on where they were; two runs on one store do not get in each other's way."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.flows.conftest import RECIPE, ROOT, TIMEOUT_S, Project, names

STEPS = 400


def processes(project: Project, text: str) -> list[int]:
    """Processes at work in the project's folder whose command line holds the text."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            inside = entry.name.isdigit() and (entry / "cwd").readlink() == project.folder.resolve()
            if inside and text in (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                found.append(int(entry.name))
        except OSError:
            continue  # it ended meanwhile
    return found


def wait_until(condition, what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {TIMEOUT_S} s for {what}"
        time.sleep(0.05)


def logged_steps(project: Project) -> list[int]:
    paths = [*project.store.glob(".partial/*/logs/log.jsonl"), *project.store.glob("trained/*/logs/log.jsonl")]
    return [json.loads(line)["step"] for line in paths[0].read_text().splitlines()] if paths else []


def checkpoint_steps(project: Project) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in project.store.glob(".partial/*/checkpoints/checkpoint-*"))


@pytest.mark.long
def test_killed_trainer_and_killed_flow_resume_from_the_last_checkpoint(tmp_path: Path) -> None:
    project = Project(tmp_path)
    recipe = copy.deepcopy(RECIPE)
    recipe["training"]["max_steps"] = STEPS
    recipe["runtime"] |= {"save_steps": 20, "logging_steps": 1}
    project.write(recipe)

    flow = project.start(project.command("run"))
    wait_until(lambda: len(checkpoint_steps(project)) > 0, "a checkpoint")
    trainers = processes(project, "sft_core.train.main")
    assert trainers, "a trainer is at work"
    for trainer in trainers:
        os.kill(trainer, signal.SIGKILL)
    assert flow.wait(TIMEOUT_S) != 0, "the run says that it failed"
    first_reached = checkpoint_steps(project)[-1]
    assert first_reached < STEPS

    # A resume that is killed while it copies finished tasks is no attempt to go on from.
    copying = project.start([sys.executable, "-m", "steps.cli.main", "resume"])
    runs = project.folder / ".metaflow" / "SFTFlow"
    wait_until(lambda: len(list(runs.glob("[0-9]*/start"))) == 2, "the first step of the resume")
    os.killpg(copying.pid, signal.SIGKILL)
    copying.wait(TIMEOUT_S)

    # The scheduler alone is killed: its task and trainer must not live on.
    resumed = project.start([sys.executable, "-m", "steps.cli.main", "resume"])
    wait_until(lambda: checkpoint_steps(project)[-1] > first_reached, "a checkpoint of the resumed run")
    for scheduler in processes(project, "sft_flow.py resume"):
        os.kill(scheduler, signal.SIGKILL)
    resumed.wait(TIMEOUT_S)
    wait_until(lambda: not processes(project, "sft_core.train.main"), "the orphaned trainer to end")
    second_reached = checkpoint_steps(project)[-1]
    assert first_reached < second_reached < STEPS

    output = project.sft("resume")
    assert "exact_match" in output
    log = (project.folder / "log.txt").read_text() + output
    assert re.findall(r"/(\w+)/\d+ .pid \d+.\] Task is starting", log).count("download") == 2, "each source once"
    newest = "from metaflow import Flow, namespace; namespace(None); print(*next(iter(Flow('SFTFlow'))).user_tags)"
    assert "recipe:small" in project.call([sys.executable, "-c", newest])
    assert max(names(project.builds()).values()) == 1, "no step built its output again"
    steps = logged_steps(project)
    assert steps == list(range(1, STEPS + 1)), "each step is logged once: training went on"
    log = (next(project.store.glob("trained/*/logs/train.log"))).read_text()
    starts = [int(line.split("=")[1].split("/")[0]) for line in log.splitlines() if line.startswith("step=")]
    again = len(starts) - len(set(starts))
    assert again <= 2 * 20, f"{again} steps were computed again, at most one interval a kill"


def stopped_at(log: str) -> int:
    """The step at which the ranks ended, as asked."""
    [step] = set(re.findall(r"stopped at step (\d+) of", log))
    return int(step)


@pytest.mark.long
def test_run_that_is_asked_to_stop_saves_and_a_resume_computes_no_step_again(tmp_path: Path) -> None:
    """As a pod (the scheduler alone), a terminal (its process group) and systemd (every process) ask."""
    project = Project(tmp_path)
    recipe = copy.deepcopy(RECIPE)
    recipe["training"]["max_steps"] = STEPS
    recipe["runtime"] |= {"save_steps": STEPS, "logging_steps": 1}
    project.write(recipe)

    def everyone(run: subprocess.Popen, number: int) -> None:
        for process in processes(project, ""):
            os.kill(process, number)

    asked = [
        (lambda run, number: run.send_signal(number), signal.SIGTERM, [*project.command("run"), "--with", "retry"])
    ]
    resume = [sys.executable, "-m", "steps.cli.main", "resume"]
    asked += [
        (lambda run, number: os.killpg(run.pid, number), signal.SIGINT, resume),
        (everyone, signal.SIGTERM, resume),
    ]
    reached = 0
    for attempt, (ask, number, command) in enumerate(asked):
        run = project.start(command, log=f"log{attempt}.txt")
        wait_until(lambda: len(logged_steps(project)) > reached + 5, "some steps")  # noqa: B023
        ask(run, number)
        ask(run, number)  # twice is once
        assert run.wait(TIMEOUT_S) != 0, "the run says that it failed"
        log = (tmp_path / f"log{attempt}.txt").read_text()
        assert log.count("a training saves a checkpoint after this step, then the run ends") == 1, log[-3000:]
        assert reached < stopped_at(log) < STEPS
        reached = stopped_at(log)
        assert checkpoint_steps(project)[-1] == reached
        assert not processes(project, "sft_core.train.main")
        assert "Task is starting (retry)" not in log or "the run is stopping: this task does not start" in log

    assert "exact_match" in project.sft("resume")
    log = next(project.store.glob("trained/*/logs/train.log")).read_text()
    starts = [int(step) for step in re.findall(r"^step=(\d+)/", log, re.MULTILINE)]
    assert starts == list(range(1, STEPS + 1))


@pytest.mark.long
def test_two_runs_on_one_store_both_finish_and_build_each_output_once(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.write(RECIPE)
    (tmp_path / ".metaflow").mkdir()  # Metaflow's own folder: its first two runs race to make it
    runs = [project.start(project.command("run"), log=f"log{number}.txt") for number in (1, 2)]
    try:
        codes = [run.wait(TIMEOUT_S) for run in runs]
    except subprocess.TimeoutExpired:
        for run in runs:
            os.killpg(run.pid, signal.SIGKILL)
        raise
    logs = [(tmp_path / f"log{number}.txt").read_text() for number in (1, 2)]
    assert codes == [0, 0], logs[0][-2000:] + logs[1][-2000:]
    counted = names(project.builds())
    assert counted["trained 0"] == 1
    assert max(counted.values()) == 1


def test_resume_runs_as_many_tasks_at_once_as_a_run() -> None:
    """The flow file says it by what Metaflow reads of the environment before its commands are known."""
    asked = "import os, flows.sft_flow; print(*(os.environ[f'METAFLOW_{c}_MAX_WORKERS'] for c in ('RUN', 'RESUME')))"
    for workers in (None, "6"):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("METAFLOW_")}
        environment |= {} if workers is None else {"METAFLOW_RUN_MAX_WORKERS": workers}
        done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.stdout.split() == [workers or "2"] * 2, done.stderr


@pytest.mark.long
def test_flow_of_more_than_a_hundred_sources_runs_and_resumes(tmp_path: Path) -> None:
    """In the environment of the flow's file: Metaflow by itself stops a foreach at 100 tasks."""
    project = Project(tmp_path)
    project.settings = {"JOINED": str(tmp_path / "file"), "METAFLOW_DEFAULT_METADATA": "local"}
    command = [sys.executable, str(ROOT / "tests" / "flows" / "flow_of_many.py")]
    failed = project.call([*command, "run"], succeeds=False)
    assert "the file is not there yet" in failed and failed.count("Task finished successfully") == 1 + 101
    (tmp_path / "file").touch()
    assert "joined 101 sources" in project.call([*command, "resume"])
