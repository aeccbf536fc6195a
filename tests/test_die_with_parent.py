"""Processes whose parent ends before they ask to end with it, and after."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sft_core.die_with_parent import STARTED_BY
from sft_core.train.launch import run, variables

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends orphans on Linux only")
ROOT = Path(__file__).resolve().parents[1]
# The output of all is read to its end, which comes with the end of the last of them.
PARENT = """
import multiprocessing, os, sys, time
from sft_core.die_with_parent import STARTED_BY, die_with_parent

def child(parent, told, parent_ends):
    if parent_ends == "before":
        while os.getppid() == parent:
            time.sleep(0.01)
    print("child", os.getpid(), flush=True)
    die_with_parent(parent if told == "argument" else None)
    print("asked", flush=True)
    if parent_ends == "after":
        time.sleep(60)
    print("lived on", flush=True)

if __name__ == "__main__":
    told, parent_ends = sys.argv[1], os.path.basename(sys.argv[2])
    if told == "variable":
        os.environ[STARTED_BY] = str(os.getpid())
    arguments = (os.getpid(), told, parent_ends)
    if told == "multiprocessing":
        process = multiprocessing.get_context("fork").Process(target=child, args=arguments)
        process.start()
    elif os.fork() == 0:
        child(*arguments)
        os._exit(0)
    if parent_ends == "never":
        process.join() if told == "multiprocessing" else os.wait()
    if parent_ends == "after":
        time.sleep(60)
    os._exit(0)
"""


def start(tmp_path: Path, told: str, parent_ends: str, **variables: str) -> subprocess.Popen[str]:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    return subprocess.Popen(
        [sys.executable, str(script), told, parent_ends],
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("told", ["argument", "variable", "multiprocessing"])
def test_parent_ended_before_the_call_ends_the_child(told: str, tmp_path: Path) -> None:
    output, _ = start(tmp_path, told, "before").communicate(timeout=30)
    assert output.startswith("child")
    assert "asked" not in output


def test_parent_ended_but_not_the_one_above_it_ends_the_child(tmp_path: Path) -> None:
    # A rank whose torchrun was killed: the launcher, which the variable names, is there still.
    output, _ = start(tmp_path, "from above", "before", **{STARTED_BY: str(os.getpid())}).communicate(timeout=30)
    assert output.startswith("child")
    assert "asked" not in output


@pytest.mark.parametrize("told", ["argument", "variable", "multiprocessing", "not at all"])
def test_parent_alive_leaves_the_child_alone(told: str, tmp_path: Path) -> None:
    output, _ = start(tmp_path, told, "never").communicate(timeout=30)
    assert output.endswith("lived on\n")


def test_process_that_names_itself_lives() -> None:
    # A task on another machine: the flow's file names the scheduler where nobody did.
    code = f"import os; os.environ['{STARTED_BY}'] = str(os.getpid())\n"
    code += "from sft_core.die_with_parent import die_with_parent; die_with_parent(); print('lives')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "lives\n"


def test_grandparent_named_and_alive_leaves_the_child_alone(tmp_path: Path) -> None:
    output, _ = start(tmp_path, "from above", "never", **{STARTED_BY: str(os.getpid())}).communicate(timeout=30)
    assert output.endswith("lived on\n")


def test_parent_killed_after_the_call_ends_the_child(tmp_path: Path) -> None:
    parent = start(tmp_path, "variable", "after")
    assert parent.stdout is not None
    assert parent.stdout.readline().startswith("child")
    assert parent.stdout.readline() == "asked\n"
    parent.send_signal(signal.SIGKILL)
    output, _ = parent.communicate(timeout=10)
    assert output == ""


def test_launched_process_whose_starter_ended_before_it_asked_ends(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    script = tmp_path / "agent.py"
    script.write_text(PARENT)  # in torchrun's place: it starts a rank and is gone before the rank asks
    arguments = [str(script), "from above", str(tmp_path / "before")]
    run(arguments, variables(tmp_path, num_threads=1), tmp_path, log=tmp_path / "logs" / "train.log")
    output = (tmp_path / "logs" / "train.log").read_text()
    assert output.startswith("child")
    assert "asked" not in output
