"""How answers to a task's rows are scored: on its report split, and in a search on its selection split."""

from __future__ import annotations

from sft_core.evaluate.metrics.registry import metric_class, metric_identity
from sft_core.pins.pinned import PinnedRecipe
from sft_core.store.stage import Json


def scoring_of_answers(pinned: PinnedRecipe, task: str) -> dict[str, Json]:
    """The metric's identity and the length of an answer, for a stage's section."""
    evaluation = pinned.recipe.evaluation
    return {
        "max_new_tokens": evaluation.max_new_tokens_by_task.get(task, evaluation.max_new_tokens),
        "metric": metric_identity(evaluation, task),
    }


def wants_conversation(pinned: PinnedRecipe, task: str) -> bool:
    """Whether the task's metric reads the row's conversation."""
    return "conversation" in metric_class(pinned.recipe.evaluation.metric_of(task)).asks_for
