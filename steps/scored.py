"""The tasks of a recipe, sources' and lm-eval's alike: which stage scores a task, and why a task is not scored."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sft_core.pins.pinned import PinnedRecipe
from sft_core.recipe.evaluation import LM_EVAL
from sft_core.report.shown import shown
from sft_core.store.lookups import Lookups
from sft_core.store.stage import Needs, Part, Stage
from sft_core.store.store import Store
from steps import evaluate
from steps.harness import HARNESS

KILLED = "its process was killed; was there memory enough?"


MIN_REASON, MAX_REASON, MAX_REASONS = 40, 300, 3800  # bytes: the UI shows no artifact larger than 4 KB


def scoring_stage(model: str, task: str) -> tuple[Stage, Part]:
    """The output with the model's scores on a task. task: its name in the report."""
    if task.startswith(LM_EVAL):
        return HARNESS, {"model": model, "task": task.removeprefix(LM_EVAL)}
    return evaluate.EVALUATED, {"model": model, "task": task}


def scored_tasks(pinned: PinnedRecipe, part: Part) -> list[str]:
    """The tasks of a report or a release: all without those in part["without"], whose evaluation failed."""
    return [task for task in pinned.recipe.scored if task not in part.get("without", ())]


def scorings(pinned: PinnedRecipe, part: Part) -> Needs:
    """The scorings that a report or a release reads."""
    tasks = scored_tasks(pinned, part)
    return {f"{model}.{task}": scoring_stage(model, task) for task in tasks for model in pinned.recipe.models}


def not_scored(store: Store, pinned: PinnedRecipe, reasons: dict[str, str]) -> dict[str, str]:
    """{task: why} of the tasks that lack a score of some model. reasons: those that tasks gave; see reasons_of."""
    lookups = Lookups()
    by_task = {task: [scoring_stage(model, task) for model in pinned.recipe.models] for task in pinned.recipe.scored}
    missing = [
        task
        for task, scorings in by_task.items()
        if any(store.locate(stage, pinned, part, lookups).status != "hit" for stage, part in scorings)
    ]
    return shortened({task: reasons.get(task) or KILLED for task in missing})


def reasons_of(inputs: Iterable[Any]) -> dict[str, str]:
    """{task: why} of tasks that were not scored. A share that was killed gives no reason.

    inputs: the branches of the flow's join, each a share of tasks, or one task in older runs. If a branch itself
    failed, all its tasks failed with it.
    """
    reasons: dict[str, str] = {}
    for branch in inputs:
        tasks = [branch.task] if hasattr(branch, "task") else getattr(branch, "share", [])
        if branch.failure:
            reasons |= dict.fromkeys(tasks, branch.failure.exception)
        reasons |= getattr(branch, "failures", {})
    return reasons


def shortened(reasons: dict[str, str]) -> dict[str, str]:
    """The first line of each reason as text, cut so that together they fit what the UI shows of an artifact."""
    room = MAX_REASONS - sum(len(task.encode()) + 16 for task in reasons)
    size = max(MIN_REASON, min(MAX_REASON, room // max(1, len(reasons))))
    lines = {task: shown(reason.strip() or "no reason was given").splitlines()[0] for task, reason in reasons.items()}
    return {task: line.encode()[:size].decode(errors="ignore") for task, line in lines.items()}
