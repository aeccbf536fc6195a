"""The job of a round of training: its identity, which is JSON, and its spec, which says where things are."""

from __future__ import annotations

import dataclasses
from typing import Any

from sft_core.pins.pinned import PinnedRecipe
from sft_core.recipe.sections import Training
from sft_core.search.job import RolloutSpec, SearchSpec
from sft_core.store.stage import Json, Part, Section
from sft_core.train.job import ModelLoader, SelectionSpec, TokenizerLoader, TrainSpec
from steps.metrics import scoring_of_answers

_WEIGHTS = ("pin", "path", "revision", "config")  # keys of a model's identity or loader that name its weights


def job_identity(pinned: PinnedRecipe, part: Part) -> Section:
    """Everything of a job that changes the trained weights."""
    phase, name = pinned.phase(part), pinned.phase_name(part)
    training = _training(pinned, part).model_dump(mode="json")
    del training["loss_scope"]  # the tokens' key has it already
    if training["router_aux_loss_coef"] is None:
        del training["router_aux_loss_coef"]  # outputs from before there was this key keep their keys
    job: dict[str, Json] = {
        "model": _start_model(pinned, name, pinned.model_identity),
        "tokenizer": pinned.tokenizer_identity,
        "chat_template": pinned.pins["template"],
        "training": training,
        "sources": phase.sources,
    }
    if (selection := _selection_spec(pinned, name)) is not None:
        job["selection"] = dataclasses.asdict(selection)
    if (rollout := _rollout_spec(pinned, part)) is not None:
        job["rollout"] = rollout.identity
    return job


def job_spec(pinned: PinnedRecipe, part: Part) -> TrainSpec | SearchSpec:
    """The job as the builder takes it: a search's in a phase that has a search."""
    rollout, phase, name = _rollout_spec(pinned, part), pinned.phase(part), pinned.phase_name(part)
    spec = TrainSpec(
        rank_module=rank_module(pinned, name),
        model=ModelLoader(**_start_model(pinned, name, pinned.model_loader)),
        tokenizer=TokenizerLoader(**pinned.tokenizer_loader),
        chat_template=pinned.template_text,
        training=_training(pinned, part),
        sources=phase.sources,
        selection=_selection_spec(pinned, name),
    )
    return spec if rollout is None else SearchSpec(spec, rollout)


def rank_module(pinned: PinnedRecipe, phase: str) -> str:
    """The module that each rank runs."""
    return "sft_core.train.main" if pinned.recipe.phases[phase].search is None else "sft_core.search.main"


def _start_model(pinned: PinnedRecipe, phase: str, model: dict[str, Any]) -> dict[str, Any]:
    """How the phase loads its start model. A later phase's weights are an input, so nothing here names them."""
    if pinned.phase_before(phase) is None:
        return model
    return {name: None if name in _WEIGHTS else value for name, value in model.items()}


def _training(pinned: PinnedRecipe, part: Part) -> Training:
    phase, name = pinned.phase(part), pinned.phase_name(part)
    if phase.search is None:
        return phase.training
    rollout = pinned.rounds[name].rollouts[part["round"]]
    return phase.training.model_copy(update={"num_train_epochs": rollout.epochs})


def _selection_spec(pinned: PinnedRecipe, phase: str) -> SelectionSpec | None:
    if (search := pinned.recipe.phases[phase].search) is not None:
        return SelectionSpec(1 / search.evaluations_per_epoch, keep_best=False)
    during = pinned.recipe.evaluation.during_training
    return SelectionSpec(during.every_epochs, during.keep_best) if during is not None else None


def _rollout_spec(pinned: PinnedRecipe, part: Part) -> RolloutSpec | None:
    """None without a search."""
    phase = pinned.phase(part)
    if (search := phase.search) is None:
        return None
    rounds = pinned.rounds[pinned.phase_name(part)]
    rollout, tasks = rounds.rollouts[part["round"]], phase.dataset_mixture.trained_sources
    repacks = search.needs.repacks and phase.packing.packing_strategy == "ffd"
    return RolloutSpec(
        search=search,
        tasks=tasks,
        sizes=dict(rounds.sizes) if search.needs.sizes else {},
        active=list(rollout.active),
        start=rollout.start,
        answers={task: scoring_of_answers(pinned, task) for task in tasks} if search.score == "answers" else None,
        max_length=phase.packing.max_length if repacks else None,
    )
