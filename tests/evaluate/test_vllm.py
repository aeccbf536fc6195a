"""vLLM answers as transformers does, in an environment of its own: SFT_VLLM_PYTHON names its interpreter."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel

from sft_core.evaluate.engine import Request
from sft_core.evaluate.generate import WithTransformers, generate_answers
from sft_core.evaluate.loading import keeping_a_model
from sft_core.evaluate.rows import read_rows
from sft_core.evaluate.with_vllm import WithVllm, draw_seed, unmet_vllm
from sft_core.pins.pinned import pin
from sft_core.recipe.evaluation import Sampling
from sft_core.recipe.parse import parse_recipe
from sft_core.recipe.sections import VllmSettings
from sft_core.store.store import Store
from steps.evaluate import EVALUATED, measure_ahead
from tests.evaluate.test_generate import PAD, VOCABULARY, model, prompts
from tests.evaluate.test_sampling import probabilities
from tests.train.tiny import SOURCES, tiny_recipe

__all__ = ["model", "prompts"]  # fixtures
TASK, SHARE = "checksum_think", 0.1  # of this machine's memory, where vLLM runs on a CPU
PYTHON = os.environ.get("SFT_VLLM_PYTHON")
SETTINGS = VllmSettings(python=PYTHON, gpu_memory_utilization=SHARE)
needs_vllm = pytest.mark.skipif(PYTHON is None, reason="SFT_VLLM_PYTHON names no environment with vllm")


@pytest.fixture(scope="module")
def engine(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WithVllm]:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    started = WithVllm(folder, SETTINGS, dtype="float32", trust_remote_code=False, max_model_len=64)
    yield started
    started.close()
    assert not started.is_running


@needs_vllm
def test_vllm_answers_as_transformers_does(engine: WithVllm, model: PreTrainedModel, prompts: list[np.ndarray]) -> None:
    plain = generate_answers(model, prompts, stop_ids=[], pad_id=PAD, max_new_tokens=8, batch_size=4)
    stop = int(plain[0][3])  # one that is really written
    request = Request(prompts, stop_ids=[stop], max_new_tokens=8)
    expected = WithTransformers(model, PAD, 4).write(request)
    assert {len(ids) for ids in expected} >= {4, 8}, "stopped ones and ones that are cut off"
    assert [ids.tolist() for ids in engine.write(request)] == [ids.tolist() for ids in expected]
    assert engine.name.startswith("vllm 0.")


@needs_vllm
def test_vllm_draws_follow_the_shaped_distribution_and_are_the_rows_own(
    engine: WithVllm, model: PreTrainedModel, prompts: list[np.ndarray]
) -> None:
    count, prompt = 4000, prompts[3]

    def request(prompts: list[np.ndarray], keys: list[int], num_samples: int) -> Request:
        sampling = Sampling(temperature=2.0, top_k=12, seed=3, num_samples=num_samples)
        return Request(prompts, stop_ids=[], max_new_tokens=1, sampling=sampling, draw_keys=keys)

    found = engine.write(request([prompt] * 2, [7, 8], count // 2))
    assert len(found) == count
    drawn = np.array([ids[0] for ids in found])
    shares = np.bincount(drawn, minlength=VOCABULARY) / count
    expected = probabilities(model, prompt, 2.0)
    expected[np.argsort(-expected)[12:]] = 0
    expected /= expected.sum()
    assert (shares[expected == 0] == 0).all()
    assert (np.abs(shares - expected) < 4.5 * np.sqrt(expected * (1 - expected) / count) + 1e-6).all()

    # In another place, beside another row, with fewer samples.
    again = engine.write(request([prompt, prompts[0]], [8, 5], 9))
    assert [ids[0] for ids in again[:9]] == drawn[count // 2 :][:9].tolist(), "a row's draws are its own"


@needs_vllm
def test_task_scored_with_vllm_has_the_rows_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")  # as in the flow
    store, found = Store(tmp_path), {}
    for engine in ("transformers", "vllm"):
        settings = tiny_recipe(evaluation={"max_rows": 12, "max_new_tokens_by_task": {TASK: 5}, "engine": engine})
        settings["model"]["config"] |= {"head_dim": 32}  # the least that vLLM has on a CPU
        settings["runtime"] |= {"vllm": {"python": PYTHON, "gpu_memory_utilization": SHARE}}
        ref = store.ensure(EVALUATED, pin(parse_recipe(settings)), model="base", task=TASK)
        found[engine] = read_rows(store.path(ref)), store.manifest(ref)["counts"]
        files = {path.name for path in store.path(ref).iterdir()}
        assert files == {"manifest.json", "rows.parquet", "scores.json"}, "no weights are left there"
    rows, counts = found["vllm"]
    assert rows.equals(found["transformers"][0])
    assert len({tuple(outputs) for outputs in rows["outputs"].to_pylist()}) > 3, "answers that differ"
    assert counts.pop("engine").startswith("vllm 0.")
    assert counts == {name: value for name, value in found["transformers"][1].items() if name != "engine"}


@needs_vllm
def test_kept_model_is_loaded_once_and_its_vllm_started_once_for_all_tasks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    longest = {SOURCES[0]: 5, SOURCES[1]: 9}
    settings = tiny_recipe(evaluation={"max_rows": 4, "max_new_tokens_by_task": longest, "engine": "vllm"})
    settings["model"]["config"] |= {"head_dim": 32}
    settings["runtime"] |= {"vllm": SETTINGS.model_dump()}
    store, pinned = Store(tmp_path), pin(parse_recipe(settings))
    with keeping_a_model():
        for task in SOURCES:
            measure_ahead(store, pinned, {"model": "base", "task": task})
        refs = [store.ensure(EVALUATED, pinned, model="base", task=task) for task in SOURCES]
    assert all(store.manifest(ref)["counts"]["engine"].startswith("vllm 0.") for ref in refs)
    told = [text for text in caplog.messages if text.startswith(("loaded=", "started="))]
    assert len(told) == 2 and told[0].startswith("loaded=random weights")
    assert f"max_model_len={settings['packing']['max_length'] + 9}" in told[1]


@needs_vllm
def test_vllm_that_fails_is_told_with_its_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="vLLM ended with exit status 1"):
        WithVllm(tmp_path / "none", SETTINGS, dtype="float32", trust_remote_code=False, max_model_len=64)
    assert str(tmp_path / "none") in capfd.readouterr().err


def test_engine_is_in_the_key_and_where_it_runs_is_not(tmp_path: Path) -> None:
    def key(engine: str, **settings: Any) -> str:
        recipe = tiny_recipe(evaluation={"engine": engine})
        recipe["runtime"] |= {"vllm": settings}
        located = Store(tmp_path).locate(EVALUATED, pin(parse_recipe(recipe)), {"model": "base", "task": TASK})
        return str(located.identity)

    assert key("vllm") != key("transformers")
    assert key("vllm") == key("vllm", python="elsewhere", tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("python", "told"),
    [
        (sys.executable, r"evaluation\.engine: found 'vllm', and .* holds it.*pip install vllm.*runtime\.vllm\.python"),
        ("/nowhere/python", r"runtime\.vllm\.python: found '/nowhere/python'; there is no such program"),
    ],
)
def test_missing_vllm_is_told_before_any_work(python: str, told: str, tmp_path: Path) -> None:
    recipe = tiny_recipe(evaluation={"engine": "vllm"})
    recipe["runtime"] |= {"vllm": {"python": python}}
    with pytest.raises(ValueError, match=told):
        Store(tmp_path).ensure(EVALUATED, pin(parse_recipe(recipe)), model="base", task=TASK)


def test_a_folder_named_vllm_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert unmet_vllm(VllmSettings()) is not None


def test_draw_seeds_are_those_of_seed_row_and_sample() -> None:
    seeds = {draw_seed(seed, key, sample) for seed in (0, 1) for key in (0, 5, 2**64 - 1) for sample in (0, 1)}
    assert len(seeds) == 12
    assert draw_seed(0, 5, 1) == draw_seed(0, 5, 1)
