"""The plan of a run: every output that a recipe leads to, and an estimate of what training them takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sft_core.data.mixing.mixture_counts import MixtureCounts
from sft_core.pins.pinned import PinnedRecipe
from sft_core.store.lookups import Lookups
from sft_core.store.made_by import drift
from sft_core.store.ref import Ref
from sft_core.store.stage import Located, Part, Stage, Unresolved, part_name
from sft_core.store.store import Store
from steps.mix import MIXTURE
from steps.pack import PACKED
from steps.release import PUSHED, RELEASED
from steps.search import progress
from steps.train import TRAINED


def phases_to_train(planned: list[Located], pinned: PinnedRecipe) -> list[str]:
    """The phases of which a round is still to be trained."""
    open_rounds = [located for located in planned if located.stage is TRAINED and located.status != "hit"]
    return list(dict.fromkeys(pinned.phase_name(located.part) for located in open_rounds))


def estimated(store: Store, pinned: PinnedRecipe, planned: list[Located]) -> list[str]:
    """A line for each phase that is still to be trained: what it takes of a GPU. Imports torch and transformers."""
    phases = phases_to_train(planned, pinned)
    if not phases:
        return []
    try:
        _ = pinned.model_identity
    except Unresolved:
        return []  # the plan reports the unresolved name
    from sft_core.data.packing.plan import PackPlan
    from sft_core.train.memory.estimate import estimate, estimate_line
    from sft_core.train.models.model import skeleton

    loader = pinned.model_loader
    try:
        shape = skeleton(**{name: loader[name] for name in ("path", "revision", "config", "trust_remote_code")})
    except (OSError, ValueError) as error:
        return [f"no estimate of memory: the model's config cannot be read ({str(error).splitlines()[0]})"]
    lines = []
    for phase in phases:
        plan, trained_share = None, 1.0
        packed, mixture = (
            next(each for each in planned if each.stage is stage and pinned.phase_name(each.part) == phase)
            for stage in (PACKED, MIXTURE)
        )
        if packed.status == mixture.status == "hit" and packed.ref and mixture.ref:
            plan = PackPlan.read(store.path(packed.ref))
            counts = MixtureCounts.from_json(store.manifest(mixture.ref)["counts"])
            trained_share = counts.trained_tokens / counts.tokens
        keys = pinned.recipe.for_phase(phase)
        line = estimate_line(estimate(keys, shape, plan, trained_share=trained_share), keys)
        lines.append(line if len(pinned.recipe.phases) == 1 else f"{phase}: {line}")
    return lines


def drifts(store: Store, pinned: PinnedRecipe, planned: Sequence[Located]) -> list[str]:
    """How today's code and libraries differ from those that made outputs whose keys have a version in their place.

    Such outputs stay hits. A line for outputs with the same difference.
    """
    refs: dict[tuple[str, str], list[Ref]] = {}
    for located in planned:
        if located.status != "hit" or located.ref is None or located.stage.version is None:
            continue
        before = store.manifest(located.ref).get("made_by")  # older manifests do not have it
        now = before and located.stage.made_by(located.stage.modules(pinned, located.part))
        if before and now and (difference := drift(before, now)):
            refs.setdefault((located.stage.name, difference), []).append(located.ref)
    lines = []
    for (stage, difference), of_stage in refs.items():
        names, name = f"{len(of_stage)} outputs of {stage}", f"{stage}/KEY"
        if len(of_stage) == 1:
            names = name = str(of_stage[0])
        lines.append(f"{names}: {difference}. `sft store gc {name} --delete` lets the next run make it anew")
    return lines


def plan(store: Store, pinned: PinnedRecipe) -> list[Located]:
    """Every output of the recipe, inputs first; of a search that is not over, the outputs known so far."""
    lookups = Lookups()
    pinned = progress(store, pinned, lookups).pinned
    planned: dict[tuple[str, str], Located] = {}

    def visit(stage: Stage, part: Part) -> None:
        if (name := (stage.name, part_name(part))) in planned:
            return  # the graph has far more paths than outputs: visit each output once
        for needed, needed_part in stage.inputs(pinned, part).values():
            visit(needed, needed_part)
        planned[name] = store.locate(stage, pinned, part, lookups)

    visit(PUSHED if pinned.recipe.hub else RELEASED, {})
    return sorted(planned.values(), key=lambda located: ORDER.index(located.stage.name))


ORDER = [
    *("conversations", "rendered", "tokens"),
    *("signatures", "duplicates", "report_prompts", "contamination"),  # where the recipe asks for them
    *(
        "mixture",
        "windows",
        "packed",
        "selection",
        "trained",
        "checkpoint",
        "evaluated",
        "harness",
        "report",
        "release",
        "pushed",
    ),
]


def differences(before: Any, after: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, before, after) for each difference of two identities; a nested key is joined by dots."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            yield from differences(before.get(key), after.get(key), f"{where}.{key}" if where else str(key))
    elif before != after:
        yield where, before, after
