"""Kills at any instant: what a run resumes to is, bit for bit, what it would have been without them."""

import itertools
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from sft_core.pins.pinned import pin
from sft_core.recipe.parse import parse_recipe
from sft_core.store.store import Store
from sft_core.train.checkpoints import numbered, stop_request
from steps.pack import PACKED
from steps.train import TRAINED
from tests.train.ranks import Attempt, error_of, steps_of, wait_for_checkpoint
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


@pytest.fixture(scope="module")
def start(start_ranks: Callable[..., Attempt]) -> Callable[..., Attempt]:
    def begin(out: Path, size: int, **runtime: Any) -> Attempt:
        return start_ranks({**RECIPE, "runtime": {**RECIPE["runtime"], **runtime}}, out, size)

    return begin


def log_of(folder: Path) -> list[dict[str, Any]]:
    """What was logged, without what depends on the machine's speed."""
    events = [json.loads(line) for line in (folder / "logs" / "log.jsonl").read_text().splitlines()]
    speeds = ("seconds", "tokens_per_s", "trained_tokens_per_s", "tflops_per_s", "memory_gib")
    return [{name: value for name, value in event.items() if name not in speeds} for event in events]


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 2])
def test_killed_at_random_instants_ends_with_the_same_bits(
    size: int, start: Callable[..., Attempt], tmp_path: Path
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


BETWEEN = {"save_steps": 3, "logging_steps": 5}


def assert_same_log_and_bits(resumed: Path, whole: Path) -> None:
    expected = log_of(whole)
    assert [event["step"] for event in expected] == [1, 5, 10, 15, 20, 24], "every fifth, the first and the last"
    assert {"loss", "grad_norm", "learning_rate", "loss/copy_no_think", "loss/checksum_think"} <= expected[2].keys()
    assert log_of(resumed) == expected
    weights, expected_weights = (folder / "model" / "model.safetensors" for folder in (resumed, whole))
    assert weights.read_bytes() == expected_weights.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_killed_between_two_lines_of_the_log_writes_the_same_log(
    size: int, start: Callable[..., Attempt], tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole, size, **BETWEEN).wait(120)
    attempt = start(killed, size, **BETWEEN)
    wait_for_checkpoint(killed, 6, attempt)
    attempt.kill()
    newest = int(numbered(killed / "checkpoints")[-1].name.removeprefix("checkpoint-"))
    assert newest < NUM_STEPS and newest % 5, "not between two lines of the log"
    assert start(killed, size, **BETWEEN).wait(120)
    assert f"resume checkpoint=checkpoint-{newest}\n" in (killed / "logs" / "ranks.log").read_text()
    assert_same_log_and_bits(killed, whole)


@pytest.mark.slow
@pytest.mark.parametrize("step", [21, NUM_STEPS])
def test_checkpoint_alone_goes_on_elsewhere_with_its_logs(
    step: int, start: Callable[..., Attempt], tmp_path: Path
) -> None:
    """As on a machine that has what another one kept behind a URL; the last checkpoint leaves no step to train."""
    whole, elsewhere = tmp_path / "whole", tmp_path / "elsewhere"
    assert start(whole, 1, **BETWEEN).wait(120)
    checkpoint = Path("checkpoints") / f"checkpoint-{step}"
    shutil.copytree(whole / checkpoint, elsewhere / checkpoint)
    (elsewhere / "logs").mkdir()
    (elsewhere / "logs" / "log.jsonl").write_text('{"step": 1, "loss": 9.0, "of": 24}\n')  # stale, as of an own try
    assert start(elsewhere, 1, **BETWEEN).wait(120)
    assert steps_of((elsewhere / "logs" / "ranks.log").read_text()) == ([24] if step == 21 else [])
    assert_same_log_and_bits(elsewhere, whole)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_zero_stopped_goes_on_to_the_same_bits_and_otherwise_not_at_all(
    strategy: str, start: Callable[..., Attempt], tmp_path: Path
) -> None:
    settings, whole, stopped = {**BETWEEN, "distributed": strategy}, tmp_path / "whole", tmp_path / "stopped"
    assert start(whole, 2, **settings).wait(120)
    attempt = start(stopped, 2, **settings)
    wait_for_checkpoint(stopped, 6, attempt)
    stop_request(stopped).touch()  # as the launcher does on SIGTERM
    assert attempt.wait(60)
    newest = numbered(stopped / "checkpoints")[-1].name
    assert f"stopped at step {newest.removeprefix('checkpoint-')} of {NUM_STEPS}, as asked" in error_of(stopped)
    log = (stopped / "logs" / "log.jsonl").read_text()

    written = f"{newest} was written under {strategy} by 2 ranks"
    for size, other, told in (
        (1, strategy, f"runtime.num_processes: found 1 rank, and {written}"),
        (2, "ddp", f"runtime.distributed: found ddp, and {written}"),
    ):
        assert start(stopped, size, **{**settings, "distributed": other}).wait(60)
        assert told in error_of(stopped).splitlines()[-1]
    assert (stopped / "logs" / "log.jsonl").read_text() == log

    assert start(stopped, 2, **settings).wait(120)
    assert_same_log_and_bits(stopped, whole)


@pytest.mark.slow
def test_other_number_of_ranks_goes_on_with_the_same_stream(start: Callable[..., Attempt], tmp_path: Path) -> None:
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
from sft_core.pins.pinned import pin
from sft_core.recipe.parse import parse_recipe
from sft_core.store.store import Store
from steps.train import TRAINED
Store(sys.argv[1]).ensure(TRAINED, pin(parse_recipe(json.loads(sys.argv[2]))), round=0)
"""


@pytest.mark.long
def test_sigterm_saves_and_another_machine_goes_on_to_the_same_bits(
    start: Callable[..., Attempt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
