"""The cached index of lm-eval's tasks: made once, again when a file changes, and right about every folder.

lm-eval here is a copy of the installed one with a handful of tasks; each test runs a process of its own on it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_core.pins.lm_eval_index import built_in

ROOT = Path(__file__).resolve().parents[2]
TASK = "task: {name}\n{more}dataset_path: json\ntest_split: test\ndoc_to_text: x\ndoc_to_target: {target}\n"
IMPORTS = """
import json, sys
from sft_core.pins.lm_eval_index import folders_of, known_names, task_manager
from sft_core.pins.lm_eval_tasks import digest_task, pin_tasks
"""


def write_task(path: Path, name: str, more: str = "", target: str = "y") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(TASK.format(name=name, more=more, target=target))


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """The folder of lm-eval's tasks: `red` and `blue` in folders of their own, with a tag and a group around both."""
    package, tasks = built_in().parent, tmp_path / "packages" / "lm_eval" / "tasks"
    shutil.copytree(package, tasks.parent, ignore=shutil.ignore_patterns("tasks", "__pycache__"))
    tasks.mkdir()
    for path in built_in().glob("*.py"):
        shutil.copy(path, tasks)
    write_task(tasks / "colours" / "warm" / "red.yaml", "red", "tag: colour\n")
    write_task(tasks / "colours" / "cold" / "blue.yaml", "blue", "tag: colour\n")
    write_task(tasks / "shapes" / "round.yaml", "round")
    (tasks / "groups").mkdir()
    (tasks / "groups" / "both.yaml").write_text("group: both\ntask: [red, round]\n")
    return tasks


@pytest.fixture
def run(tasks: Path, tmp_path: Path) -> Callable[..., Any]:
    """Runs code on that lm-eval and returns what it writes as JSON."""

    def run(code: str, cache: Path = tmp_path / "cache") -> Any:
        path = os.pathsep.join([str(tasks.parents[1]), str(ROOT)])
        env = os.environ | {"PYTHONPATH": path, "SFT_CACHE": str(cache)}
        command = [sys.executable, "-c", f"{IMPORTS}\nsys.stdout.write(json.dumps({code}))"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def cached(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").iterdir())


@pytest.mark.slow
def test_index_is_read_from_the_cache_until_a_file_changes(run: Callable[..., Any], tasks: Path, tmp_path: Path):
    known = run("known_names()")
    assert known["red"] == ["colours/warm", []] and known["colour"] == [None, ["blue", "red"]]
    assert known["both"] == ["groups", ["red", "round"]]
    (path,) = cached(tmp_path)
    assert json.loads(path.read_text()) == known
    path.write_text(json.dumps({"marked": ["shapes", []]}))
    assert run("known_names()") == {"marked": ["shapes", []]}, "it is not made again"

    write_task(tasks / "shapes" / "square.yaml", "square")
    assert set(run("known_names()")) == {*known, "square"}
    text = (tasks / "shapes" / "square.yaml").read_text()
    (tasks / "shapes" / "square.yaml").write_text(text.replace("square", "oblong"))  # as many bytes
    assert set(run("known_names()")) == {*known, "oblong"}
    assert len(cached(tmp_path)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["{", "[3]"])
def test_index_that_is_damaged_is_made_again(run: Callable[..., Any], tmp_path: Path, damage: str):
    known = run("known_names()")
    (path,) = cached(tmp_path)
    path.write_text(damage)
    assert run("known_names()") == known and json.loads(path.read_text()) == known


@pytest.mark.slow
def test_index_that_cannot_be_cached_is_made_each_time(run: Callable[..., Any]):
    assert "red" in run("known_names()", cache=Path("/proc/no-such-folder"))


@pytest.mark.slow
def test_group_leads_to_the_folders_of_its_members(run: Callable[..., Any]):
    pins = run('pin_tasks(["both", "red"], None, None)["tasks"]')
    assert pins["both"]["folders"] == ["colours/warm", "groups", "shapes"]
    assert pins["red"]["folders"] == ["colours/warm"]
    assert run('digest_task("both", None, ["colours/warm", "groups", "shapes"])') == pins["both"]["digest"]


@pytest.mark.slow
def test_tag_of_tasks_in_two_folders_has_all_of_them(run: Callable[..., Any], tasks: Path):
    """lm-eval forgets those of the first folder where it reads the two one after the other."""
    pin = run('pin_tasks(["colour"], None, None)["tasks"]["colour"]')
    assert pin["folders"] == ["colours"]
    assert run('sorted(task_manager(None, ["colours"]).task_index["colour"].tags)') == ["blue", "red"]
    assert run('digest_task("colour", None, ["colours"])') == pin["digest"]
    write_task(tasks / "shapes" / "green.yaml", "green", "tag: colour\n")
    assert run('pin_tasks(["colour"], None, None)["tasks"]["colour"]["folders"]') == ["."]


@pytest.mark.slow
def test_name_in_two_folders_is_the_one_that_lm_eval_takes(run: Callable[..., Any], tasks: Path):
    write_task(tasks / "shapes" / "red.yaml", "red", target="another")
    assert run('task_manager(None, None).task_index["red"].cfg["doc_to_target"]') == "y", "the first by path"
    folders = run('pin_tasks(["both"], None, None)["tasks"]["both"]["folders"]')
    assert folders == ["colours/warm", "groups", "shapes"], "the other red is read too, for `round`"
    assert run(f'task_manager(None, {folders}).task_index["red"].cfg["doc_to_target"]') == "y"


@pytest.mark.slow
def test_users_tasks_alone_need_no_index(run: Callable[..., Any], tmp_path: Path):
    user = tmp_path / "user"
    write_task(user / "mine.yaml", "mine", "tag: ours\n")
    assert run(f'pin_tasks(["mine", "ours"], {str(user)!r}, None)["tasks"]["ours"]["folders"]') == []
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_users_task_takes_the_place_of_lm_evals_and_a_users_group_leads_into_lm_eval(
    run: Callable[..., Any], tmp_path: Path
):
    user = tmp_path / "user"
    write_task(user / "red.yaml", "red", target="mine")
    (user / "mixed.yaml").write_text("group: mixed\ntask: [red, blue]\n")
    pins = run(f'pin_tasks(["mixed", "red", "both"], {str(user)!r}, None)["tasks"]')
    assert pins["red"]["folders"] == [] and pins["mixed"]["folders"] == ["colours/cold"]
    assert pins["both"]["folders"] == ["groups", "shapes"], "whose red is the user's"
    for name, pin in pins.items():
        assert run(f"digest_task({name!r}, {str(user)!r}, {pin['folders']})") == pin["digest"]
