"""Builds a roll-out: a training that starts from another roll-out's weights, under the eyes of the search."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from sft_core.search.evaluations import evaluation_folder
from sft_core.search.job import RolloutJob, SearchSpec
from sft_core.train.checkpoints import numbered, step_of
from sft_core.train.launch import from_start, job_here, launch
from sft_core.train.log_file import read_events

if TYPE_CHECKING:
    from sft_core.store.stage import Build, Json

log = logging.getLogger(__name__)
CONVERSATIONS = "conversations:"  # before a task's name, among the inputs of a build


def build_rollout(build: Build, *, job: SearchSpec, round: int) -> dict[str, Json]:
    """Trains, and writes curves.json, evaluations/ and logs/. Raises RuntimeError with the rank's error."""
    rollout_job = rollout_here(build, job, round)
    drop_checkpoints_without_weights(build.out)
    return launch(build, rollout_job.train, rollout_job)


def rollout_here(build: Build, spec: SearchSpec, round: int) -> RolloutJob:
    """The job of a spec, with the paths and the runtime of this build."""
    before = [build.inputs[f"round:{number}"].resolve() for number in range(round)]
    conversations = {
        name.removeprefix(CONVERSATIONS): path.resolve()
        for name, path in build.inputs.items()
        if name.startswith(CONVERSATIONS)
    }
    rollout, model = spec.rollout, from_start(build, spec.train).model
    if (start := rollout.start) is not None:
        weights = evaluation_folder(before[start.round], start.evaluation)
        model = dataclasses.replace(model, path=str(weights), revision=None, config=None)
    # At most the weights at each task's peak, at the last evaluation and at the best one.
    num_models = rollout.search.settings.weights_at_once or len(rollout.active) + 2
    train = dataclasses.replace(spec.train, model=model, num_models=num_models)
    return RolloutJob(job_here(build, train, round), rollout, before, conversations)


def drop_checkpoints_without_weights(out: Path) -> None:
    """Removes the checkpoints where evaluations that they rely on are gone, as on another machine.

    The roll-out then starts from its beginning.
    """
    newest = numbered(out / "checkpoints")[-1:]
    events = read_events(out / "logs" / "selection.jsonl") if newest else []
    known = [event for event in events if event["step"] <= step_of(newest[0])]
    if known and not all(evaluation_folder(out, evaluation).is_dir() for evaluation in known[-1]["kept"]):
        log.warning("checkpoint=%s the weights of earlier evaluations are gone: starts anew", newest[0].name)
        shutil.rmtree(out / "checkpoints")
