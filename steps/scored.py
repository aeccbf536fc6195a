"""Any task of a recipe, a source's or lm-eval's: which stage scores it, and why it is not scored."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sft_core.pins.pinned import PinnedRecipe
from sft_core.recipe.evaluation import LM_EVAL
from sft_core.store.lookups import Lookups
from sft_core.store.stage import Needs, Part, Stage
from sft_core.store.store import Store
from steps import evaluate
from steps.harness import HARNESS

KILLED = "its process was killed; was there memory enough?"


MIN_REASON, MAX_REASON, MAX_REASONS = 40, 300, 3800  # bytes: the UI shows no artifact of more than 4 KB


def scoring_stage(model: str, task: str) -> tuple[Stage, Part]:
    """What scores the model on a task, by the name that it has in the report."""
    if task.startswith(LM_EVAL):
        return HARNESS, {"model": model, "task": task.removeprefix(LM_EVAL)}
    return evaluate.EVALUATED, {"model": model, "task": task}


def scored_tasks(pinned: PinnedRecipe, part: Part) -> list[str]:
    """The tasks of a report or a release: all, or without those whose evaluation failed, which its part names."""
    return [task for task in pinned.recipe.scored if task not in part.get("without", ())]


def scorings(pinned: PinnedRecipe, part: Part) -> Needs:
    """What a report or a release reads."""
    tasks = scored_tasks(pinned, part)
    return {f"{model}.{task}": scoring_stage(model, task) for task in tasks for model in pinned.recipe.models}


def not_scored(store: Store, pinned: PinnedRecipe, reasons: dict[str, str]) -> dict[str, str]:
    """{task: why} of those that lack a score of a model. reasons: what is known of why; see reasons_of."""
    lookups = Lookups()
    by_task = {task: [scoring_stage(model, task) for model in pinned.recipe.models] for task in pinned.recipe.scored}
    missing = [
        task
        for task, scorings in by_task.items()
        if any(store.locate(stage, pinned, part, lookups).status != "hit" for stage, part in scorings)
    ]
    return shortened({task: reasons.get(task) or KILLED for task in missing})


def reasons_of(inputs: Iterable[Any]) -> dict[str, str]:
    """{task: why} of tasks that were not scored, as those of the flow's step tell it; a step that was killed does not.

    Of a share all of whose tasks failed with it, too; and of runs in which each task had a step of its own.
    """
    found: dict[str, str] = {}
    for one in inputs:
        tasks = [one.task] if hasattr(one, "task") else getattr(one, "share", [])
        if one.failure:
            found |= dict.fromkeys(tasks, one.failure.exception)
        found |= getattr(one, "failures", {})
    return found


def shortened(reasons: dict[str, str]) -> dict[str, str]:
    """A line each, and together no more than the UI shows of an artifact."""
    room = MAX_REASONS - sum(len(task.encode()) + 16 for task in reasons)
    size = max(MIN_REASON, min(MAX_REASON, room // max(1, len(reasons))))
    lines = {task: (reason.strip() or "no reason is told").splitlines()[0] for task, reason in reasons.items()}
    return {task: line.encode()[:size].decode(errors="ignore") for task, line in lines.items()}
