"""Jobs on the way to their ranks, through logs/job.json."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sft_core.pins.pinned import pin
from sft_core.recipe.parse import parse_recipe
from sft_core.recipe.search.registry import STRATEGIES
from sft_core.recipe.sections import Lora, Runtime
from sft_core.rounds import Point
from sft_core.search.job import RolloutJob, RolloutSpec, SearchSpec
from sft_core.search.launch import rollout_here
from sft_core.store.stage import Build
from sft_core.train.assemble import bytes_on_disk
from sft_core.train.job import TrainJob, TrainSpec, job_path, read_job, write_job
from sft_core.train.launch import job_here
from steps.train import TRAINED
from tests.search.test_searching import recipe
from tests.train.tiny import SOURCES, tiny_recipe

INPUTS = {name: Path(name) for name in ("packs", "selection", *SOURCES, "round:0", "conversations:a")}


def spec_of(data: dict[str, Any]) -> TrainSpec:
    return TRAINED.loaders(pin(parse_recipe(data)), {"round": 0})["job"]


def train_job(tmp_path: Path, **changes: Any) -> TrainJob:
    data = tiny_recipe(**changes)
    return job_here(Build(tmp_path, INPUTS, parse_recipe(data).runtime), spec_of(data), 0)


def test_job_is_read_as_it_was_written(tmp_path: Path) -> None:
    during = {"during_training": {"every_epochs": 0.3, "keep_best": True}}
    training = {"lora": {"target_modules": ["q_proj"]}, "learning_rate": 1.1e-5, "loss_scope": "completion"}
    job = train_job(tmp_path, evaluation=during, training=training, runtime={"report_to": ["wandb"]})
    assert job.spec.selection is not None and job.spec.training.loss_scope == "completion"
    assert write_job(job, tmp_path) == job_path(tmp_path)
    assert read_job(TrainJob, job_path(tmp_path)) == job
    written = json.loads(job_path(tmp_path).read_text())
    assert written["spec"]["training"]["weight_decay"] == 0.1 and written["spec"]["training"]["seed"] == 42


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_job_of_a_rollout_is_read_as_it_was_written(strategy: str, tmp_path: Path) -> None:
    parsed = parse_recipe(recipe(strategy=strategy))
    assert parsed.last_phase.search is not None
    answers = {SOURCES[0]: {"max_new_tokens": 7, "metric": {"name": "exact_match"}}}
    rollout = RolloutSpec(
        parsed.last_phase.search, [*SOURCES], {SOURCES[0]: 3}, [SOURCES[0]], Point(0, 2), answers, 384
    )
    train = train_job(tmp_path, dataset_mixture={"selection_share": 0.2})
    job = RolloutJob(train, rollout, [tmp_path / "before"], {SOURCES[0]: tmp_path})
    write_job(job, tmp_path)
    assert read_job(RolloutJob, job_path(tmp_path)) == job


def test_job_of_a_rollout_starts_from_the_weights_of_an_evaluation(tmp_path: Path) -> None:
    data = recipe()
    parsed = parse_recipe(data)
    assert parsed.last_phase.search is not None
    train = spec_of(tiny_recipe(evaluation={"during_training": {}}))
    rollout = RolloutSpec(parsed.last_phase.search, [*SOURCES], {}, [SOURCES[0]], Point(0, 2), None, None)
    job = rollout_here(Build(tmp_path, INPUTS, parsed.runtime), SearchSpec(train, rollout), 1)
    before = Path("round:0").resolve()
    assert job.before == [before] and job.conversations == {"a": Path("conversations:a").resolve()}
    model = job.train.spec.model
    assert (model.path, model.config, model.revision) == (str(before / "evaluations" / "002"), None, None)
    assert job.train.spec.num_models == 3, "of a task's peak, the last and the best"
    robust = parse_recipe(recipe(preset="robust", max_kept=5)).last_phase.search
    assert robust is not None
    kept = rollout_here(
        Build(tmp_path, INPUTS, parsed.runtime), SearchSpec(train, dataclasses.replace(rollout, search=robust)), 1
    )
    assert kept.train.spec.num_models == 5


def test_bytes_on_disk_are_checkpoints_and_models(tmp_path: Path) -> None:
    job = train_job(tmp_path)
    assert bytes_on_disk(10, job) == 12 * 10 * (2 + 1) + 4 * 10
    zero = dataclasses.replace(job, runtime=Runtime(distributed="zero3", keep_checkpoints=1))
    assert bytes_on_disk(10, zero) == 16 * 10 * (1 + 1) + 4 * 10
    several = dataclasses.replace(job, spec=dataclasses.replace(job.spec, num_models=4))
    assert bytes_on_disk(10, several) == 12 * 10 * 3 + 4 * 10 * 4
    best = train_job(tmp_path, evaluation={"during_training": {"keep_best": True}})
    assert bytes_on_disk(10, best) == 12 * 10 * 4 + 4 * 10
    training = job.spec.training.model_copy(update={"lora": Lora()})
    adapter = dataclasses.replace(job, spec=dataclasses.replace(job.spec, training=training))
    assert bytes_on_disk(10, adapter) == 4 * 10
