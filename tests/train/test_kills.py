"""Kills at any instant: what a run resumes to is, bit for bit, what it would have been without them."""

import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from sft_core.pins import PinnedRecipe, pin
from sft_core.recipe import parse_recipe
from sft_core.store import Store
from sft_core.train.checkpoints import numbered
from steps.pack import PACKED
from steps.train import TRAINED
from tests.train.tiny import LLAMA, ROOT, tiny_recipe

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forkserver and signals of Linux")
NUM_STEPS, SAVE_STEPS, NUM_KILLS = 24, 3, 5
RECIPE = tiny_recipe(
    # Wide, so that a checkpoint takes a good part of the time; dropout, so that the state of random numbers matters.
    model={"config": {**LLAMA, "hidden_size": 256, "intermediate_size": 512, "attention_dropout": 0.2}},
    packing={"max_length": 128},
    training={"max_steps": NUM_STEPS, "global_batch_size": 2},
    runtime={"save_steps": SAVE_STEPS},
)


def rank(job: str, number: int, size: int, port: int, log: str) -> None:
    """One rank, in a process that has its libraries loaded already."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    group = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in group.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"})
    from sft_core.train.main import main

    main(Path(job))


class Attempt:
    """The ranks of one start."""

    def __init__(self, job: Path, size: int, log: Path):
        context = multiprocessing.get_context("forkserver")
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        arguments = (size, port, str(log))
        self.ranks = [context.Process(target=rank, args=(str(job), number, *arguments)) for number in range(size)]
        for process in self.ranks:
            process.start()

    def is_alive(self) -> bool:
        return any(process.is_alive() for process in self.ranks)

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()
        self.wait()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether all ended by then."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        for process in self.ranks:
            process.join(None if end is None else max(0.0, end - time.monotonic()))
        return not self.is_alive()


@pytest.fixture(scope="module")
def libraries() -> None:
    """Ranks are forked from a process that has loaded what they need: a start takes a second in place of ten."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["trl", "datasets", "peft", "sft_core.train.trainer", "sft_core.train.main", __name__]
    )
    first = context.Process(target=int)
    first.start()
    first.join()


@pytest.fixture(scope="module")
def start(libraries: None, make_job: Callable[[PinnedRecipe, Path], dict[str, Any]]) -> Callable[[Path, int], Attempt]:
    def begin(out: Path, size: int) -> Attempt:
        (out / "logs").mkdir(parents=True, exist_ok=True)
        job = make_job(pin(parse_recipe(RECIPE)), out)
        (out / "logs" / "job.json").write_text(json.dumps(job))
        return Attempt(out / "logs" / "job.json", size, out / "logs" / "ranks.log")

    return begin


def steps_of(text: str) -> list[int]:
    return [int(step) for step in re.findall(r"^step=(\d+)/", text, re.MULTILINE)]


@pytest.mark.parametrize("size", [1, 2])
def test_killed_at_random_instants_ends_with_the_same_bits(
    size: int, start: Callable[[Path, int], Attempt], tmp_path: Path
) -> None:
    assert start(tmp_path / "whole", size).wait(120)
    assert steps_of((tmp_path / "whole" / "logs" / "ranks.log").read_text()) == list(range(1, NUM_STEPS + 1))

    rng, out = random.Random(size), tmp_path / "killed"
    log, staging = out / "logs" / "ranks.log", out / "staging"
    num_killed = 0
    for kill in range(NUM_KILLS):
        attempt = start(out, size)
        if kill == 0:  # while a checkpoint is written
            end = time.monotonic() + 60
            while not any(staging.glob("checkpoint-*/*")) and time.monotonic() < end:
                time.sleep(0.001)
        else:
            before = len(steps_of(log.read_text()))
            while len(steps_of(log.read_text())) == before and attempt.is_alive():
                time.sleep(0.002)  # random instants from here on: most of a start is loading
            time.sleep(rng.uniform(0.0, 0.3))
        num_killed += attempt.is_alive()
        attempt.kill()
        assert kill or any(staging.glob("checkpoint-*")), "it was not killed while it wrote"
    assert num_killed >= 3
    assert start(out, size).wait(120)
    steps = steps_of(log.read_text())
    for position, (one, following) in enumerate(itertools.pairwise(steps)):
        assert following == one + 1 or 0 <= one - following < SAVE_STEPS, f"{position=}: {one} and then {following}"
    assert steps[-1] == NUM_STEPS
    assert len(steps) <= NUM_STEPS + NUM_KILLS * SAVE_STEPS
    weights, expected = (tmp_path / name / "model" / "model.safetensors" for name in ("killed", "whole"))
    assert weights.read_bytes() == expected.read_bytes()
    logged, expected_log = (
        [json.loads(line) for line in (tmp_path / name / "logs" / "log.jsonl").read_text().splitlines()]
        for name in ("killed", "whole")
    )
    assert [event["loss"] for event in logged] == [event["loss"] for event in expected_log]


def test_other_number_of_ranks_goes_on_with_the_same_stream(
    start: Callable[[Path, int], Attempt], tmp_path: Path
) -> None:
    assert start(tmp_path / "whole", 1).wait(120)
    attempt = start(tmp_path / "moved", 1)
    end = time.monotonic() + 60
    while len(numbered(tmp_path / "moved" / "checkpoints")) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    attempt.kill()
    assert start(tmp_path / "moved", 2).wait(120)
    events = [
        [json.loads(line) for line in (tmp_path / name / "logs" / "log.jsonl").read_text().splitlines()]
        for name in ("moved", "whole")
    ]
    # Dropout draws other numbers on other ranks; what is trained on is the same, source by source.
    counts = [[sorted(key for key in event if key.startswith("loss/")) for event in run] for run in events]
    assert counts[0] == counts[1]
    assert [event["loss"] for event in events[0]] == pytest.approx([event["loss"] for event in events[1]], rel=0.1)


LAUNCHER = """
import json, sys
from sft_core.pins import pin
from sft_core.recipe import parse_recipe
from sft_core.store import Store
from steps.train import TRAINED
Store(sys.argv[1]).ensure(TRAINED, pin(parse_recipe(json.loads(sys.argv[2]))), round=0)
"""


def test_sigterm_saves_and_another_machine_goes_on_to_the_same_bits(
    start: Callable[[Path, int], Attempt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {**RECIPE, "runtime": {**RECIPE["runtime"], "save_steps": 1000}}
    pinned, url = pin(parse_recipe(recipe)), f"file://{tmp_path}/bucket"
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "one"))
    here = Store(url)
    here.ensure(PACKED, pinned)
    located = here.locate(TRAINED, pinned, {"round": 0})
    assert located.ref is not None
    log = here.scratch(located.ref) / "logs" / "train.log"
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, url, json.dumps(recipe)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    end = time.monotonic() + 90
    while not (log.exists() and steps_of(log.read_text())) and launcher.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    launcher.send_signal(signal.SIGTERM)
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    (stopped,) = set(re.findall(rf"stopped at step (\d+) of {NUM_STEPS}, as asked", output))
    assert 1 <= int(stopped) < NUM_STEPS
    assert [path.name for path in numbered(here.scratch(located.ref) / "checkpoints")] == [f"checkpoint-{stopped}"]

    assert start(tmp_path / "whole", 1).wait(120)
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "two"))
    there = Store(url)
    ref = there.ensure(TRAINED, pinned, round=0)
    steps = steps_of((there.path(ref) / "logs" / "train.log").read_text())
    assert steps == list(range(int(stopped) + 1, NUM_STEPS + 1)), "no step was made twice"
    weights = load_file(there.path(ref) / "model" / "model.safetensors")
    expected = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    assert all(weights[name].equal(expected[name]) for name in expected)
