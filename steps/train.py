"""train: one round of training on the packs, in a process group of its own; the checkpoint that a phase ends with."""

from __future__ import annotations

from typing import Any

from sft_core.pins.pinned import PinnedRecipe
from sft_core.rounds import Rounds
from sft_core.search.deliver import build_delivered
from sft_core.search.job import SearchSpec
from sft_core.search.launch import CONVERSATIONS as OF_CONVERSATIONS
from sft_core.search.launch import build_rollout
from sft_core.store.stage import Build, Needs, Part, Section, Stage, Unresolved
from sft_core.store.store import Store
from sft_core.train import accelerator
from sft_core.train.job import TrainSpec
from sft_core.train.launch import START, TEMPORARY, build_trained
from steps.download import CONVERSATIONS
from steps.metrics import wants_conversation
from steps.pack import PACKED, rows_to_pack
from steps.selection import SELECTION
from steps.training_job import job_identity, job_spec, rank_module


def _section(pinned: PinnedRecipe, part: Part) -> Section:
    return {"job": job_identity(pinned, part), "round": part["round"]}


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
    # A search decides by the measurements of all its rounds so far.
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


def build_round(build: Build, *, job: TrainSpec | SearchSpec, round: int) -> dict[str, Any]:
    """Trains, in a process group of its own. Raises RuntimeError with the error of the rank that failed first."""
    if isinstance(job, SearchSpec):
        return build_rollout(build, job=job, round=round)
    return build_trained(build, job=job, round=round)


# The version stands for sft_core/train: raise it when a change there changes what is trained.
MODEL = ("model/*",)  # of what a training writes, the files that are scored and released

TRAINED = Stage(
    "trained",
    build_round,
    section=_section,
    loaders=lambda pinned, part: {"job": job_spec(pinned, part)},
    needs=_needs,
    modules=lambda pinned, part: (rank_module(pinned, pinned.phase_name(part)), "sft_core.train.merge"),
    version=3,
    libraries=("torch", "transformers", "trl", "accelerate", "peft", "deepspeed", "liger-kernel"),
    resumable=True,
    temporary=TEMPORARY,
)


def _weights(pinned: PinnedRecipe, part: Part) -> Section:
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
    """The output whose model/ a phase ends with: its one round of training, or a search's checkpoint."""
    if pinned.recipe.phases[phase].search is None:
        return TRAINED, last_round(pinned, phase)
    return CHECKPOINT, pinned.part_of(phase)


def last_round(pinned: PinnedRecipe, phase: str) -> Part:
    """The round whose weights a phase ends with; until its search is over, the last round so far."""
    rounds = pinned.rounds.get(phase, Rounds())
    return pinned.part_of(phase, round=rounds.best.round if rounds.best else max(0, len(rounds.rollouts) - 1))


def check_machine(store: Store, pinned: PinnedRecipe, part: Part) -> None:
    """Raises ValueError if this machine cannot train the round. On a cluster only the task itself knows its machine."""
    if store.locate(TRAINED, pinned, part).status != "hit":
        accelerator.check_machine(pinned.recipe.for_phase(pinned.phase_name(part)))
