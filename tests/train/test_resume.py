"""Resuming in the folder of a run that ended early, in this process."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState

from sft_core.train.callbacks import LogEvents
from sft_core.train.checkpoints import numbered
from tests.train.test_checkpoints import digest_as_before
from tests.train.tiny import Run, tiny_recipe


@pytest.mark.slow
def test_train_ended_before_the_model_was_saved_saves_the_same(train_here: Callable[..., Run]) -> None:
    recipe = tiny_recipe(training={"max_steps": 3}, runtime={"save_steps": 2})
    first = train_here(recipe)
    weights, events = (first.model / "model.safetensors").read_bytes(), first.events
    shutil.rmtree(first.model)
    checkpoints = first.folder / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    again = train_here(recipe, out=first.folder)
    assert (again.model / "model.safetensors").read_bytes() == weights
    assert again.events == events
    assert len(events) == 3


@pytest.mark.slow
def test_train_newest_checkpoint_torn_goes_on_from_the_one_before(train_here: Callable[..., Run]) -> None:
    recipe = tiny_recipe(training={"max_steps": 3}, runtime={"save_steps": 1})
    first = train_here(recipe)
    weights = (first.model / "model.safetensors").read_bytes()
    torn = first.folder / "checkpoints" / "checkpoint-3" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    (first.folder / "staging" / "checkpoint-9").mkdir(parents=True)
    (first.model / "model.safetensors").unlink()
    again = train_here(recipe, out=first.folder)
    assert (again.model / "model.safetensors").read_bytes() == weights
    assert [event["step"] for event in again.events] == [1, 2, 3]
    assert not (first.folder / "staging" / "checkpoint-9").exists()


@pytest.mark.slow
def test_train_checkpoint_with_digests_of_before_is_gone_on_from(
    train_here: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    recipe = tiny_recipe(training={"max_steps": 4}, runtime={"save_steps": 2})
    first = train_here(recipe)
    weights, events = (first.model / "model.safetensors").read_bytes(), first.events
    older, newest = numbered(first.folder / "checkpoints")
    digest_as_before(older)
    shutil.rmtree(newest)
    shutil.rmtree(first.model)
    with caplog.at_level(logging.INFO):
        again = train_here(recipe, out=first.folder)
    assert "resume checkpoint=checkpoint-2" in caplog.text
    assert (again.model / "model.safetensors").read_bytes() == weights
    assert [event["loss"] for event in again.events] == [event["loss"] for event in events]


def test_log_resumed_takes_back_what_comes_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3, 4)]
    path.write_text("\n".join([*lines, '{"step": 5, "lo']))  # the disk was full
    state = TrainerState(is_world_process_zero=True, global_step=3)
    LogEvents(path).on_train_begin(None, state, TrainerControl())  # type: ignore[arg-type]
    assert path.read_text().splitlines() == lines[:3]


def test_log_of_a_run_without_a_checkpoint_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n')
    state = TrainerState(is_world_process_zero=True, global_step=0)
    LogEvents(path).on_train_begin(None, state, TrainerControl())  # type: ignore[arg-type]
    assert path.read_text() == ""
