"""What a run will do, before it does it: every output that a recipe leads to, and the checks that come first."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from sft_core.pins import PinnedRecipe, pin
from sft_core.recipe import Recipe
from sft_core.release.push import check_push
from sft_core.store import Located, Stage, Store, Unresolved
from sft_core.train.accelerator import lost_updates, unmet_demands
from sft_core.train.arguments import check_extra
from steps.evaluate import check_report_prompts, count_report_prompts
from steps.pack import PACKED
from steps.release import PUSHED, RELEASED
from steps.train import TRAINED

log = logging.getLogger(__name__)


def prepare(recipe: Recipe) -> PinnedRecipe:
    """The recipe with its names resolved. Raises ValueError or OSError for what would fail later and cost more."""
    pinned = pin(recipe)
    store = Store(recipe.runtime.store)
    check_report_prompts(count_report_prompts(store, pinned), pinned)
    planned = plan(store, pinned)
    if any(located.status != "hit" for located in planned):
        store.check_writable()
    if recipe.hub and any(located.stage is PUSHED and located.status != "hit" for located in planned):
        check_push(recipe.hub.model_id, recipe.hub.private)
    check_training(planned, pinned)
    if trains(planned):
        if unmet := unmet_demands(recipe):
            raise ValueError(unmet)
        if warning := lost_updates(recipe):
            log.warning(warning)
    return pinned


def trains(planned: list[Located]) -> bool:
    return any(located.stage is TRAINED and located.status != "hit" for located in planned)


def check_training(planned: list[Located], pinned: PinnedRecipe) -> None:
    """Raises ValueError for a wrong `training.extra`, if there is something to train: TRL takes seconds to import."""
    if trains(planned):
        check_extra(pinned.recipe.training.extra)


def estimated(store: Store, pinned: PinnedRecipe, planned: list[Located]) -> str | None:
    """What training takes of a GPU, in a line; None when there is nothing to train. Imports torch and transformers."""
    if not trains(planned):
        return None
    try:
        _ = pinned.model_identity
    except Unresolved:
        return None  # the plan names it
    from sft_core.data.packing import PackPlan
    from sft_core.train.estimate import estimate, told
    from sft_core.train.model import skeleton

    loader = pinned.model_loader
    try:
        shape = skeleton(**{name: loader[name] for name in ("path", "revision", "config", "trust_remote_code")})
    except (OSError, ValueError) as error:
        return f"no estimate of memory: the model's config cannot be read ({str(error).splitlines()[0]})"
    packed = next(located for located in planned if located.stage is PACKED)
    plan = PackPlan.read(store.path(packed.ref)) if packed.status == "hit" and packed.ref else None
    return told(estimate(pinned.recipe, shape, plan), pinned.recipe)


def plan(store: Store, pinned: PinnedRecipe) -> list[Located]:
    """Every output of the recipe, inputs before what reads them."""
    found: dict[tuple[str, str], Located] = {}
    seen: dict[Any, Any] = {}

    def visit(stage: Stage, part: dict[str, Any]) -> None:
        for needed, needed_part in stage.inputs(pinned, part).values():
            visit(needed, needed_part)
        located = store.locate(stage, pinned, part, seen)
        found.setdefault((stage.name, located.name), located)

    visit(PUSHED if pinned.recipe.hub else RELEASED, {})
    return sorted(found.values(), key=lambda located: ORDER.index(located.stage.name))


ORDER = [
    *("conversations", "rendered", "tokens"),
    *("signatures", "duplicates", "report_prompts", "contamination"),  # where the recipe asks for them
    *("mixture", "windows", "packed", "trained", "evaluated", "report", "release", "pushed"),
]


def differences(before: Any, after: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, before, after) wherever two identities differ, keys joined by dots."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            yield from differences(before.get(key), after.get(key), f"{where}.{key}" if where else str(key))
    elif before != after:
        yield where, before, after
