"""verdict: what a phase's training needs, tried before a run. No other output reads it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from sft_core.pins.pinned import PinnedRecipe
from sft_core.store.made_by import made_by
from sft_core.store.stage import Located, Part, Section, Stage
from sft_core.store.store import Store
from sft_core.train.accelerator import has_gpu, unseen_gpu
from sft_core.train.job import ModelLoader, TokenizerLoader
from sft_core.train.verdict import ELSEWHERE, Verdict, build_verdict, try_training
from steps.cluster import on_cluster
from steps.plan import phases_to_train

LIBRARIES = ("torch", "transformers", "trl", "accelerate", "peft", "deepspeed", "liger-kernel", "bitsandbytes")


def _section(pinned: PinnedRecipe, part: Part) -> Section:
    phase = pinned.phase(part)
    training = phase.training.model_dump(mode="json")
    del training["loss_scope"]  # of the rows' text
    return {
        "model": {**pinned.model_identity, "trust_remote_code": pinned.recipe.model.trust_remote_code},
        "tokenizer": pinned.tokenizer_identity,
        "recipe": {"training": training, "max_length": phase.packing.max_length},
        "device": device(),
        "libraries": made_by((), LIBRARIES)["libraries"],
    }


def device() -> str:
    """What trains: a CPU or GPU of this machine, or, on a cluster, another machine."""
    return ELSEWHERE if on_cluster() else "gpu" if has_gpu() else "cpu"


def _loaders(pinned: PinnedRecipe, part: Part) -> dict[str, object]:
    return {
        "model": ModelLoader(**pinned.model_loader),
        "tokenizer": TokenizerLoader(**pinned.tokenizer_loader),
        "recipe": pinned.recipe.for_phase(pinned.phase_name(part)),
    }


VERDICT = Stage(
    "verdict",
    build_verdict,
    section=_section,
    loaders=_loaders,
)


def ensure_verdicts(store: Store, pinned: PinnedRecipe, planned: list[Located]) -> list[Verdict]:
    """The verdict on each phase that is still to be trained. Raises ValueError with the faults of all phases."""
    phases, verdicts, faults = phases_to_train(planned, pinned), [], []
    for phase in phases:
        try:
            ref = store.ensure(VERDICT, pinned, **pinned.part_of(phase))
        except ValueError as error:
            if len(phases) == 1:
                raise
            faults.append(f"phase {phase}: {error}")
        else:
            verdicts.append(Verdict.from_json(store.manifest(ref)["counts"]))
    if faults:
        raise ValueError("\n".join(faults))
    return verdicts


def verdict_lines(store: Store, pinned: PinnedRecipe, planned: list[Located], *, tries: bool) -> list[str]:
    """What a plan says of the phases that are still to be trained. Nothing is built.

    tries: whether to try a phase on which the store has no verdict, which takes seconds. Its faults are lines, too: the
    run may be on another machine.
    """
    lines: list[str] = []
    is_open = False
    for phase in phases_to_train(planned, pinned):
        located = store.locate(VERDICT, pinned, pinned.part_of(phase))
        try:
            if located.status == "hit" and located.ref is not None:
                verdict = Verdict.from_json(store.manifest(located.ref)["counts"])
            elif located.status == "depends" or not tries:  # the plan reports the unresolved name
                is_open = is_open or located.status == "build"
                continue
            else:
                lines += filter(None, [unseen_gpu(pinned.recipe.for_phase(phase)) if device() == "gpu" else None])
                verdict = _try_here(pinned, phase)
        except (OSError, ValueError) as error:
            lines.append(str(error))
        else:
            lines += [verdict.line, *verdict.warnings]
    if is_open:
        lines.append(
            "start of a run tries what training needs, in seconds and once: the model's class and config, vocabulary, "
            "adapter, optimizer and schedule; --memory tries it now"
        )
    return list(dict.fromkeys(lines))


def _try_here(pinned: PinnedRecipe, phase: str) -> Verdict:
    with tempfile.TemporaryDirectory() as folder:
        return try_training(
            model=ModelLoader(**pinned.model_loader),
            tokenizer=TokenizerLoader(**pinned.tokenizer_loader),
            recipe=pinned.recipe.for_phase(phase),
            runtime=pinned.recipe.runtime,
            folder=Path(folder),
            here=device() != ELSEWHERE,
        )
