"""A run whose launcher is killed leaves no process, and the next one ends with the same weights."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from sft_core.pins.pinned import pin
from sft_core.recipe.parse import parse_recipe
from sft_core.store.store import Store
from sft_core.train.checkpoints import latest, numbered
from steps.pack import PACKED
from steps.train import TRAINED
from tests.train.tiny import LLAMA, ROOT, Run, processes_naming, tiny_recipe

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends orphans on Linux only")
NUM_STEPS = 20
LAUNCHER = """
import json, sys
from sft_core.pins.pinned import pin
from sft_core.recipe.parse import parse_recipe
from sft_core.store.store import Store
from steps.train import TRAINED
Store(sys.argv[1]).ensure(TRAINED, pin(parse_recipe(json.loads(sys.argv[2]))), round=0)
"""


def wait_for(condition: Callable[[], Any], timeout_s: float) -> bool:
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.long
def test_train_launcher_killed_continues_to_the_same_weights(
    store: Store, plain_run: Run, train_here: Callable[..., Run]
) -> None:
    recipe = tiny_recipe(
        model={"config": {**LLAMA, "attention_dropout": 0.2}},  # so that the state of the random numbers matters
        training={"max_steps": NUM_STEPS},
        runtime={"save_steps": 2},
    )
    uninterrupted = train_here(recipe)
    assert len(uninterrupted.events) == NUM_STEPS
    assert uninterrupted.events[0]["loss"] != pytest.approx(plain_run.events[0]["loss"], rel=1e-4), "no dropout"

    pinned = pin(parse_recipe(recipe))
    store.ensure(PACKED, pinned)
    located = store.locate(TRAINED, pinned, {"round": 0})
    assert located.ref is not None
    scratch = store.scratch(located.ref)
    job = str((scratch / "logs" / "job.json").resolve())
    child = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(store.root), json.dumps(recipe)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    assert wait_for(lambda: child.poll() is not None or len(numbered(scratch / "checkpoints")) >= 2, timeout_s=90)
    ranks = processes_naming(job)
    try:
        for rank in ranks:
            os.kill(rank, signal.SIGSTOP)  # one that runs would end by itself, when it writes to a closed pipe
        child.kill()
        child.wait()
        assert len(ranks) >= 2, "torchrun and its rank were at work"
        assert wait_for(lambda: not processes_naming(job), timeout_s=10), "a trainer outlived its launcher"
    finally:
        for rank in processes_naming(job):
            os.kill(rank, signal.SIGKILL)
    assert not store.has(located.ref)

    checkpoint = latest(scratch / "checkpoints")
    assert checkpoint is not None
    start = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 4 <= start < NUM_STEPS
    before = (scratch / "logs" / "train.log").read_text()
    assert store.ensure(TRAINED, pinned, round=0) == located.ref
    resumed = Run(pinned, store.path(located.ref))
    after = (resumed.folder / "logs" / "train.log").read_text().removeprefix(before)
    assert f"resume checkpoint={checkpoint.name}" in after
    steps = [int(step) for step in re.findall(r"^step=(\d+)/", after, re.MULTILINE)]
    assert steps == list(range(start + 1, NUM_STEPS + 1))
    assert [event["step"] for event in resumed.events] == list(range(1, NUM_STEPS + 1))
    assert [event["loss"] for event in resumed.events] == [event["loss"] for event in uninterrupted.events]
    weights = [(run.model / "model.safetensors").read_bytes() for run in (resumed, uninterrupted)]
    assert weights[0] == weights[1]
