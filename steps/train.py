"""train: one round of training on the packs, in a process group of its own, with a live card."""

from __future__ import annotations

import dataclasses
from typing import Any

from sft_core.pins.pinned import PinnedRecipe
from sft_core.recipe.sections import Training
from sft_core.rounds import Rounds
from sft_core.search.deliver import build_delivered
from sft_core.search.job import RolloutSpec, SearchSpec
from sft_core.search.launch import CONVERSATIONS as OF_CONVERSATIONS
from sft_core.search.launch import build_rollout
from sft_core.store.stage import Build, Needs, Part, Stage, Unresolved
from sft_core.store.store import Store
from sft_core.train import accelerator
from sft_core.train.job import ModelLoader, SelectionSpec, TokenizerLoader, TrainSpec
from sft_core.train.launch import START, build_trained
from steps.download import CONVERSATIONS
from steps.metrics import asked_of_answers, wants_conversation
from steps.pack import PACKED, rows_to_pack
from steps.selection import SELECTION


def _section(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    phase, name = pinned.phase(part), pinned.phase_name(part)
    training = _training(pinned, part).model_dump(mode="json")
    del training["loss_scope"]  # in the tokens already
    if training["router_aux_loss_coef"] is None:
        del training["router_aux_loss_coef"]  # outputs that were trained before there was this key keep their keys
    job = {
        "model": _of_start(pinned, name, pinned.model_identity),
        "tokenizer": pinned.tokenizer_identity,
        "chat_template": pinned.pins["template"],
        "training": training,
        "sources": phase.sources,
    }
    if (selection := _selection_spec(pinned, name)) is not None:
        job["selection"] = dataclasses.asdict(selection)
    if (rollout := _rollout_spec(pinned, part)) is not None:
        job["rollout"] = rollout.identity
    return {"job": job, "round": part["round"]}


def _of_start(pinned: PinnedRecipe, phase: str, model: dict[str, Any]) -> dict[str, Any]:
    """How the phase loads the model that it starts from: of a later phase without its weights, which are an input."""
    if pinned.phase_before(phase) is None:
        return model
    return {name: None if name in ("pin", "path", "revision", "config") else value for name, value in model.items()}


def _places(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    rollout, phase, name = _rollout_spec(pinned, part), pinned.phase(part), pinned.phase_name(part)
    spec = TrainSpec(
        rank_module=rank_module(pinned, name),
        model=ModelLoader(**_of_start(pinned, name, pinned.model_loader)),
        tokenizer=TokenizerLoader(**pinned.tokenizer_loader),
        chat_template=pinned.template_text,
        training=_training(pinned, part),
        sources=phase.sources,
        selection=_selection_spec(pinned, name),
    )
    return {"job": spec if rollout is None else SearchSpec(spec, rollout)}


def rank_module(pinned: PinnedRecipe, phase: str) -> str:
    """The module that each rank runs."""
    return "sft_core.train.main" if pinned.recipe.phases[phase].search is None else "sft_core.search.main"


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
        answers={task: asked_of_answers(pinned, task) for task in tasks} if search.score == "answers" else None,
        max_length=phase.packing.max_length if repacks else None,
    )


def _needs(pinned: PinnedRecipe, part: Part) -> Needs:
    phase, name = pinned.phase(part), pinned.phase_name(part)
    needs: Needs = {"packs": (PACKED, _packs_of(pinned, part)), **rows_to_pack(pinned, part)}
    if (before := pinned.phase_before(name)) is not None:
        needs[START] = checkpoint_of(pinned, before)
    if pinned.recipe.selection_rows(name) is not None:
        needs["selection"] = (SELECTION, pinned.part_of(name))
    if (search := phase.search) is not None and search.score == "answers":
        for task in phase.dataset_mixture.trained_sources:
            if wants_conversation(pinned, task):
                needs[f"{OF_CONVERSATIONS}{task}"] = (CONVERSATIONS, {"source": task})
    # A search decides by all that was measured before.
    return needs | {f"round:{number}": (TRAINED, {**part, "round": number}) for number in range(part["round"])}


def _packs_of(pinned: PinnedRecipe, part: Part) -> Part:
    """The part of PACKED that a round trains on."""
    phase, name = pinned.phase(part), pinned.phase_name(part)
    if phase.search is None:
        return pinned.part_of(name)
    rollout = pinned.rounds[name].rollouts[part["round"]]
    if rollout.rows is None and list(rollout.active) == phase.sources:
        return pinned.part_of(name)
    return pinned.part_of(name, rows=dict(rollout.rows or dict.fromkeys(rollout.active)))


def build(build: Build, *, job: TrainSpec | SearchSpec, round: int) -> dict[str, Any]:
    """Trains, in a process group of its own. Raises RuntimeError with the error of the rank that failed first."""
    if isinstance(job, SearchSpec):
        return build_rollout(build, job=job, round=round)
    return build_trained(build, job=job, round=round)


# The version stands for sft_core/train: raise it when a change there changes what is trained.
TRAINED = Stage(
    "trained",
    build,
    section=_section,
    places=_places,
    needs=_needs,
    version=3,
    resumable=True,
    verify_inputs=True,
)


def _weights(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    best = pinned.rounds[pinned.phase_name(part)].best
    if best is None:
        raise Unresolved("the search is not over")
    return {"evaluation": best.evaluation}


CHECKPOINT = Stage(
    "checkpoint",
    build_delivered,
    section=_weights,
    needs=lambda pinned, part: {"trained": (TRAINED, last_round(pinned, pinned.phase_name(part)))},
)


def checkpoint_of(pinned: PinnedRecipe, phase: str) -> tuple[Stage, Part]:
    """The output whose model/ a phase ends with: without a search that of its one round."""
    if pinned.recipe.phases[phase].search is None:
        return TRAINED, last_round(pinned, phase)
    return CHECKPOINT, pinned.part_of(phase)


def last_round(pinned: PinnedRecipe, phase: str) -> Part:
    """The round whose weights a phase ends with; while its search is not over, the last that is known."""
    rounds = pinned.rounds.get(phase, Rounds())
    return pinned.part_of(phase, round=rounds.best.round if rounds.best else max(0, len(rounds.rollouts) - 1))


def check_machine(store: Store, pinned: PinnedRecipe, part: Part) -> None:
    """Raises ValueError for what this machine cannot train. On a cluster only the task itself knows its machine."""
    if store.locate(TRAINED, pinned, part).status != "hit":
        accelerator.check_machine(pinned.recipe.for_phase(pinned.phase_name(part)))
