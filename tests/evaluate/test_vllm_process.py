"""The process of vLLM: how long it is up, what it is told, how it ends. A stand-in takes the place of vLLM alone, the
library: it writes down what it is started with, and answers each prompt with its tokens turned round; before them comes
the seed of an answer that is drawn."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft_core.evaluate.engine import Request
from sft_core.evaluate.loading import keeping_a_model, scored_model
from sft_core.evaluate.rows import read_rows
from sft_core.evaluate.with_vllm import WithVllm, draw_seed
from sft_core.pins.pinned import PinnedRecipe, pin
from sft_core.recipe.evaluation import Sampling
from sft_core.recipe.parse import parse_recipe
from sft_core.recipe.sections import VllmSettings
from sft_core.store.store import Store
from steps.evaluate import EVALUATED, measure_ahead
from tests.evaluate.test_loading import start_model
from tests.train.tiny import ROOT, SOURCES, processes_naming, tiny_recipe

STAND_IN = """
import json, pathlib, time, types

__version__ = "0.0"
HERE = pathlib.Path(__file__).parent

class SamplingParams:
    def __init__(self, **settings):
        self.settings = settings

class LLM:
    def __init__(self, **settings):
        files = sorted(path.name for path in pathlib.Path(settings["model"]).iterdir())
        with (HERE / "starts.jsonl").open("a") as file:
            file.write(json.dumps({"settings": settings, "files": files}) + "\\n")

    def generate(self, prompts, params, use_tqdm):
        if (HERE / "slow").exists():
            (HERE / "begun").touch()
            time.sleep(100)
        if (HERE / "broken").exists():
            raise ValueError("the engine is out of order")
        answers = []
        for prompt, one in zip(prompts, params, strict=True):
            ids = prompt["prompt_token_ids"][::-1][: one.settings["max_tokens"]]
            ids = [one.settings["seed"], *ids] if "seed" in one.settings else ids
            answers.append(types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=ids)]))
        return answers
"""


class StandIn:
    """An environment that holds it."""

    def __init__(self, folder: Path):
        self.folder = folder / "environment"
        self.folder.mkdir()
        (self.folder / "vllm.py").write_text(STAND_IN)
        python = self.folder / "python"
        python.write_text(f'#!/bin/sh\nPYTHONPATH={self.folder} exec {sys.executable} "$@"\n')
        python.chmod(0o755)
        self.settings = VllmSettings(python=str(python))

    @property
    def starts(self) -> list[dict[str, Any]]:
        path = self.folder / "starts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def start(self, model: Path) -> WithVllm:
        return WithVllm(model, self.settings, dtype="float32", trust_remote_code=False, max_model_len=64)


@pytest.fixture
def stand_in(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path)


def written(engine: WithVllm, *prompts: list[int], max_new_tokens: int = 9) -> list[list[int]]:
    request = Request([np.array(ids, np.int32) for ids in prompts], stop_ids=[], max_new_tokens=max_new_tokens)
    return [ids.tolist() for ids in engine.write(request)]


def test_engine_answers_one_request_after_another_and_ends_when_it_is_closed(stand_in: StandIn, tmp_path: Path) -> None:
    engine = stand_in.start(tmp_path)
    assert engine.name == "vllm 0.0"
    long = list(range(30_000))  # more than a pipe holds
    assert written(engine, long, [7], max_new_tokens=30_000) == [long[::-1], [7]]
    assert written(engine, [1, 2, 3], max_new_tokens=2) == [[3, 2]]
    assert written(engine) == [] and len(stand_in.starts) == 1
    engine.close()
    assert not engine.is_running


def test_engine_draws_each_sample_of_a_prompt_by_its_own_seed(stand_in: StandIn, tmp_path: Path) -> None:
    engine, prompts = stand_in.start(tmp_path), [np.array(ids, np.int32) for ids in ([1, 2], [3])]
    sampling = Sampling(temperature=0.5, seed=3, num_samples=2)
    answers = engine.write(Request(prompts, stop_ids=[], max_new_tokens=9, sampling=sampling, draw_keys=[7, 8]))
    seeds = [draw_seed(3, key, sample) for key in (7, 8) for sample in (0, 1)]
    assert len(set(seeds)) == 4
    turned = ([2, 1], [2, 1], [3], [3])
    assert [ids.tolist() for ids in answers] == [[seed, *ids] for seed, ids in zip(seeds, turned, strict=True)]
    engine.close()


def test_engine_that_fails_is_told_with_its_error_and_is_not_asked_again(
    stand_in: StandIn, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = stand_in.start(tmp_path)
    (stand_in.folder / "broken").touch()
    with pytest.raises(RuntimeError, match="vLLM ended with exit status 1; see its error above"):
        written(engine, [1])
    assert "the engine is out of order" in capfd.readouterr().err
    assert not engine.is_running
    with pytest.raises(RuntimeError, match="vLLM ended with exit status 1"):
        written(engine, [1])


def test_engine_that_is_killed_is_told_as_such(stand_in: StandIn, tmp_path: Path) -> None:
    engine = stand_in.start(tmp_path)
    os.kill(engine._process.id, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="vLLM was killed; was there memory enough"):
        written(engine, [1])


PARENT = """
import sys
from pathlib import Path
import numpy as np
from sft_core.evaluate.engine import Request
from sft_core.evaluate.with_vllm import WithVllm
from sft_core.recipe.sections import VllmSettings

settings = VllmSettings(python=sys.argv[1])
engine = WithVllm(Path.cwd(), settings, dtype="float32", trust_remote_code=False, max_model_len=8)
engine.write(Request([np.array([1], np.int32)], stop_ids=[], max_new_tokens=1))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends orphans on Linux only")
def test_engine_at_work_ends_with_whoever_started_it(stand_in: StandIn, tmp_path: Path) -> None:
    (stand_in.folder / "slow").touch()
    command = [sys.executable, "-c", PARENT, str(stand_in.settings.python)]
    with subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}) as parent:
        wait_until((stand_in.folder / "begun").exists, "the engine to be at work")
        assert len(engines(parent.pid)) == 1
        parent.kill()
    wait_until(lambda: not engines(parent.pid), "the engine to end")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.05)


def engines(started_by: int) -> set[int]:
    return set(processes_naming("vllm_worker.py")) & set(processes_naming(f"\0{started_by}\0"))


class World:
    """A recipe whose answers the stand-in writes, and what its log tells in order."""

    def __init__(self, stand_in: StandIn, folder: Path, caplog: pytest.LogCaptureFixture):
        caplog.set_level("INFO")
        self._caplog, self.stand_in = caplog, stand_in
        tokens = {SOURCES[0]: 5, SOURCES[1]: 9}
        data = tiny_recipe(evaluation={"max_rows": 4, "max_new_tokens_by_task": tokens, "engine": "vllm"})
        data["runtime"] |= {"vllm": stand_in.settings.model_dump()}
        self.pinned: PinnedRecipe = pin(parse_recipe(data))
        self.store = Store(folder / "store")

    def score(self, task: str) -> Any:
        ref = self.store.ensure(EVALUATED, self.pinned, model="base", task=task)
        assert self.store.manifest(ref)["counts"]["engine"] == "vllm 0.0"
        return read_rows(self.store.path(ref))

    @property
    def log(self) -> list[str]:
        return [text.partition("=")[0] for text in self._caplog.messages if text.startswith(("loaded=", "started="))]


@pytest.fixture
def world(stand_in: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> World:
    return World(stand_in, tmp_path, caplog)


@pytest.mark.slow
def test_kept_model_is_loaded_once_and_its_engine_started_once_for_all_tasks(world: World) -> None:
    with keeping_a_model():
        for task in SOURCES:
            measure_ahead(world.store, world.pinned, {"model": "base", "task": task})
        rows = [world.score(task) for task in SOURCES]
        assert world.log == ["loaded", "started"]
        assert len(engines(os.getpid())) == 1
    (start,) = world.stand_in.starts
    longest = world.pinned.recipe.last_phase.packing.max_length + 9
    assert start["settings"]["max_model_len"] == longest
    assert "model.safetensors" in start["files"], "the start model's weights are there while it starts"
    assert not Path(start["settings"]["model"]).exists(), "and no longer"
    assert [max(map(len, table["outputs"].to_pylist())) for table in rows] == [1, 1]
    assert {table["num_generated"][0].as_py()[0] for table in rows} == {5, 9}
    assert not engines(os.getpid()), "it ends with the model"


@pytest.mark.slow
def test_room_of_an_engine_is_the_models_context_at_most(world: World) -> None:
    with keeping_a_model(), scored_model(start_model(world.pinned)) as loaded:
        loaded.make_room(100_000)
        loaded.engine(world.stand_in.settings, world.store.root.parent)
    assert world.stand_in.starts[0]["settings"]["max_model_len"] == 512


@pytest.mark.slow
def test_tasks_that_were_not_measured_ahead_are_scored_the_same_with_more_starts(world: World) -> None:
    tasks = SOURCES[::-1]  # the first one's engine has room for the second
    with keeping_a_model():
        for task in tasks:
            measure_ahead(world.store, world.pinned, {"model": "base", "task": task})
        expected = [world.score(task) for task in tasks]
    world.store, started = Store(world.store.root / "alone"), len(world.log)
    with keeping_a_model():
        found = [world.score(task) for task in tasks]
    assert world.log[started:] == ["loaded", "started", "loaded", "started"], "network and engine are never both there"
    assert all(one.equals(other) for one, other in zip(found, expected, strict=True))


@pytest.mark.slow
def test_engine_with_too_little_room_is_started_anew(world: World) -> None:
    with keeping_a_model():
        for task in SOURCES:
            world.score(task)
    rooms = [start["settings"]["max_model_len"] for start in world.stand_in.starts]
    assert rooms == [world.pinned.recipe.last_phase.packing.max_length + tokens for tokens in (5, 9)]


@pytest.mark.slow
def test_engine_that_fails_at_a_task_is_started_anew_for_the_next(world: World) -> None:
    with keeping_a_model():
        for task in SOURCES:
            measure_ahead(world.store, world.pinned, {"model": "base", "task": task})
        (world.stand_in.folder / "broken").touch()
        with pytest.raises(RuntimeError, match="vLLM ended with exit status 1"):
            world.score(SOURCES[0])
        (world.stand_in.folder / "broken").unlink()
        world.score(SOURCES[1])
    assert world.log == ["loaded", "started", "loaded", "started"], "the start model is saved for it again"
