"""How answers to a task's rows are scored: those of its report split, and in a search those of its selection split."""

from __future__ import annotations

from typing import Any

from sft_core.evaluate.metrics.registry import metric_class, metric_identity
from sft_core.pins.pinned import PinnedRecipe


def asked_of_answers(pinned: PinnedRecipe, task: str) -> dict[str, Any]:
    """The metric's identity, and how long an answer may be: JSON, a part of a stage's section."""
    evaluation = pinned.recipe.evaluation
    return {
        "max_new_tokens": evaluation.max_new_tokens_by_task.get(task, evaluation.max_new_tokens),
        "metric": metric_identity(evaluation, task),
    }


def wants_conversation(pinned: PinnedRecipe, task: str) -> bool:
    """Whether the metric asks for the row's conversation."""
    return "conversation" in metric_class(pinned.recipe.evaluation.metric_of(task)).asks_for
