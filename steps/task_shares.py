"""evaluate_all and evaluate: the tasks in shares, one for each GPU, and the scoring of a share."""

from __future__ import annotations

import dataclasses
import os
import traceback
from typing import Any

from sft_core.evaluate.gpus import gpus_by_themselves, gpus_of_share, visible_gpus
from sft_core.evaluate.loading import TASKS_AT_A_TIME
from sft_core.pins.pinned import PinnedRecipe
from sft_core.recipe.evaluation import LM_EVAL
from sft_core.recipe.recipe import Recipe
from sft_core.store.lookups import Lookups
from sft_core.store.ref import Ref
from sft_core.store.store import Store
from steps.cards import lm_eval_task
from steps.cards import task as task_card
from steps.cards.pieces import failure, heading, progress_bar, redraw
from steps.cluster import on_cluster
from steps.outcomes import Scoring, outcomes
from steps.scored import scoring_stage, shortened


def shares_of(recipe: Recipe) -> list[list[str]]:
    """The tasks of each share. On a cluster a share is one task, because each share has a machine of its own.

    Elsewhere there are as many shares as the flow runs at a time: any more would wait, and load all models again.
    """
    if on_cluster():
        return [[task] for task in recipe.scored]
    gpus = visible_gpus()
    num_shares = max(1, len(gpus) // gpus_a_share(recipe)) if gpus else TASKS_AT_A_TIME
    at_a_time = int(os.environ.get("METAFLOW_RUN_MAX_WORKERS", TASKS_AT_A_TIME))
    return dealt(costs(recipe), max(1, min(num_shares, at_a_time)))


def gpus_a_share(recipe: Recipe) -> int:
    return recipe.runtime.vllm.tensor_parallel_size if recipe.evaluation.engine == "vllm" else 1


def costs(recipe: Recipe) -> dict[str, int]:
    """The relative cost of each task, as far as the recipe tells: the most tokens of an answer."""
    evaluation = recipe.evaluation
    return {task: evaluation.max_new_tokens_by_task.get(task, evaluation.max_new_tokens) for task in recipe.scored}


def dealt(costs: dict[str, int], num_shares: int) -> list[list[str]]:
    """The tasks in `num_shares` shares of about the same cost, or in a share each if there are fewer tasks.

    Deals the most expensive task first, always to the cheapest share. Of equally cheap shares the one dealt to last
    gets it: tasks often come in pairs of a cheap and an expensive one, and dealing in turns would give one share all
    the cheap ones.
    """
    shares: list[list[str]] = [[] for _ in range(min(num_shares, len(costs)))]
    totals, latest = [0] * len(shares), [0] * len(shares)
    for turn, task in enumerate(sorted(costs, key=lambda task: -costs[task]), start=1):
        least = min(range(len(shares)), key=lambda share: (totals[share], -latest[share], share))
        shares[least].append(task)
        totals[least] += costs[task]
        latest[least] = turn
    order = list(costs)
    return [sorted(share, key=order.index) for share in shares]


@dataclasses.dataclass
class Share:
    """The outcomes of a share's tasks so far."""

    tasks: list[str]
    models: list[str]
    scored: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)  # {task: {model: stage/key}}
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)  # {task: why it is not scored}

    # Both are artifacts of the flow: plain and small.

    @property
    def evaluated(self) -> dict[str, dict[str, str]]:
        """{task: {model: stage/key}} of the tasks that are scored on all models."""
        return {task: self.scored[task] for task in self.tasks if len(self.scored.get(task, ())) == len(self.models)}

    @property
    def failures(self) -> dict[str, str]:
        return shortened(self.reasons)


class Drawing:
    """The card of a share: a section for each task once it is scored or has failed. live: Metaflow's current.card."""

    def __init__(self, store: Store, share: Share, live: Any):
        self._store, self._share, self._live = store, share, live
        self._sections: dict[str, list[Any]] = {}

    def failed(self, task: str, reason: str, text: str) -> None:
        self._share.reasons[task] = reason
        self._sections[task] = failure(f"Task {task}: failed", text or reason)

    def draw(self, num_open: int) -> None:
        """Draws the sections so far. num_open: scores still to come; while there are any, the card shows a bar."""
        for task, addresses in self._share.evaluated.items():
            if task not in self._sections:
                refs = {model: Ref(*addresses[model].split("/")) for model in self._share.models}
                try:
                    card = (lm_eval_task if task.startswith(LM_EVAL) else task_card).card
                    self._sections[task] = card(self._store, refs)
                except Exception as error:
                    # Catch it, for example a damaged output: the other tasks' sections are still shown.
                    self.failed(task, str(error), traceback.format_exc())
        sections = [component for task in self._share.tasks for component in self._sections.get(task, ())]
        if num_open:
            num_scores = len(self._share.models) * len(self._share.tasks)
            bar = progress_bar(num_scores - num_open, num_scores, label="scores of all models")
            redraw(self._live, [heading("Scoring"), bar, *sections])
        else:
            self._live.clear()
            self._live.extend(sections)


def tasks_of(dealt: list[str] | str) -> list[str]:
    """The tasks of a share. In runs of an older flow a share is one task, and its value that task's name."""
    return [dealt] if isinstance(dealt, str) else dealt


def score(store: Store, pinned: PinnedRecipe, tasks: list[str], number: int, live: Any) -> Share:
    """Scores all models on a share's tasks, in a process that loads each model once; starts none if all are scored.

    number: the share's, which decides on its GPUs. live: Metaflow's current.card, on which each task gets a section.
    """
    share = Share(tasks, pinned.recipe.models)
    lookups = Lookups()
    drawing = Drawing(store, share, live)
    missing: list[Scoring] = []
    for scoring in (Scoring(model, task) for model in share.models for task in tasks):
        try:
            stage, part = scoring_stage(*scoring)
            if store.locate(stage, pinned, part, lookups).status == "hit":
                ref = store.ensure(stage, pinned, lookups, **part)  # notes that it is used
                share.scored.setdefault(scoring.task, {})[scoring.model] = str(ref)
            else:
                missing.append(scoring)
        except Exception as error:
            drawing.failed(scoring.task, str(error), traceback.format_exc())
    missing = [scoring for scoring in missing if scoring.task not in share.reasons]
    if missing:
        drawing.draw(num_open=len(missing))
        gpus = gpus_of_share(visible_gpus(), number, gpus_a_share(pinned.recipe))
        with gpus_by_themselves(gpus):
            for outcome in outcomes(pinned, missing, gpus):
                missing.remove(outcome.scoring)
                if outcome.address is not None:
                    share.scored.setdefault(outcome.scoring.task, {})[outcome.scoring.model] = outcome.address
                else:
                    drawing.failed(outcome.scoring.task, outcome.reason, outcome.traceback)
                    missing = [scoring for scoring in missing if scoring.task != outcome.scoring.task]
                drawing.draw(num_open=len(missing))
    drawing.draw(num_open=0)
    return share
