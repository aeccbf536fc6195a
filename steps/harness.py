"""harness: base and tuned model on one task of the lm-evaluation-harness; and what scores any task of a recipe."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sft_core.evaluate.documents import read_samples
from sft_core.evaluate.harness import build_harness
from sft_core.evaluate.summary import compare
from sft_core.measuring import LM_EVAL, LmEval
from sft_core.pins import PinnedRecipe
from sft_core.report.tables import score_rows
from sft_core.rounds import BASE
from sft_core.store.lookups import Lookups
from sft_core.store.ref import Ref
from sft_core.store.stage import Needs, Part, Stage
from sft_core.store.store import Store
from steps import evaluate
from steps.cards import facts, table, warnings

MAX_SHOWN = 12  # documents on a card
KILLED = "its process was killed; was there memory enough?"
MIN_REASON, MAX_REASON, MAX_REASONS = 40, 300, 3800  # bytes: the UI shows no artifact of more than 4 KB


def _asked(pinned: PinnedRecipe) -> LmEval:
    lm_eval = pinned.recipe.evaluation.lm_eval
    assert lm_eval is not None, "what is to be scored is planned where the recipe says so"
    return lm_eval


def _template(pinned: PinnedRecipe, arguments: dict[str, Any]) -> dict[str, Any] | None:
    asked = _asked(pinned)
    if not asked.apply_chat_template:
        return None
    return arguments | {"kwargs": arguments["kwargs"] | asked.chat_template_kwargs}


def _section(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    recipe, asked = pinned.recipe, _asked(pinned)
    limits = [limit for limit in (asked.limit, recipe.limit) if limit is not None]
    return {
        "model": pinned.model_identity if part["model"] == BASE else None,
        "tokenizer": pinned.tokenizer_identity,
        "template": _template(pinned, pinned.template_identity),
        "task": pinned.harness_identity(part["task"]),
        "attn_implementation": recipe.model.attn_implementation,
        **evaluate.how_loaded(pinned),
        "num_fewshot": asked.num_fewshot,
        "limit": min(limits, default=None),
        "system_instruction": asked.system_instruction,
        "gen_kwargs": asked.gen_kwargs,
    }


def _places(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    return {
        "model": pinned.model_loader if part["model"] == BASE else None,
        "tokenizer": pinned.tokenizer_loader,
        "template": _template(pinned, pinned.template_arguments),
        "task": pinned.harness_loader(part["task"]),
    }


# The version stands for sft_core/evaluate/harness.py and served_lm.py: raise it when a change there changes a score.
HARNESS = Stage(
    "harness",
    build_harness,
    section=_section,
    places=_places,
    needs=evaluate.scored_model,
    version=2,
    verify_inputs=True,
)


def card(store: Store, refs: dict[str, Ref]) -> list[Any]:
    """The task's scores, and some of its documents with what was wanted and what came."""
    counts = {model: store.manifest(ref)["counts"] for model, ref in refs.items()}
    first, *_, last = refs
    by_metric = [{score["metric"]: score for score in counts[model]["scores"]} for model in refs]
    released = counts[last]
    shown: dict[str, Any] = {"documents": released["rows"], "examples before each": released["num_fewshot"]}
    if released["cut"]:
        shown["prompts cut to the model's context"] = f"{released['cut']} of {released['prompts']}"
    name = LM_EVAL + store.manifest(refs[last])["identity"]["part"]["task"]
    scores = {model: counts[model]["scores"] for model in refs}
    compared = compare(store.path(refs[first]), store.path(refs[last]))
    flags = []
    for row in score_rows({name: scores}, {name: compared}, {}):
        metric = row["metric"]
        of_models = [scores_of[metric] for scores_of in by_metric]
        shown[f"{metric}: {' → '.join(refs)}"] = evaluate.with_difference(of_models, compared.get(metric))
        flags += [f"{metric}: {row['flags']}"] if row["flags"] else []
    samples = [read_samples(store.path(refs[model]), MAX_SHOWN) for model in (first, last)]
    rows = [
        (
            str(after["arguments"][0][0])[-200:],
            after["target"],
            *(_came(sample["filtered_resps"]) for sample in (before, after)),
        )
        for before, after in zip(*samples, strict=True)
    ]
    return [
        *facts(f"Task {name}", shown),
        *warnings(flags),
        table(("asked (its end)", "wanted", first, last), rows),
    ]


def _came(responses: list[Any]) -> str:
    """What was written; of a choice the log-likelihood of each answer, without whether greedy decoding wrote it."""
    return ", ".join(f"{one[0]:.1f}" if isinstance(one, list) and one else str(one) for one in responses)


# Any task of a recipe: a source's report split, or one of the harness


def scoring(model: str, task: str) -> tuple[Stage, Part]:
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
    return {f"{model}.{task}": scoring(model, task) for task in tasks for model in pinned.recipe.models}


def task_card(store: Store, task: str, refs: dict[str, Ref]) -> list[Any]:
    return card(store, refs) if task.startswith(LM_EVAL) else evaluate.card(store, refs)


def not_scored(store: Store, pinned: PinnedRecipe, reasons: dict[str, str]) -> dict[str, str]:
    """{task: why} of those that lack a score of a model. reasons: what is known of why; see reasons_of."""
    lookups = Lookups()
    by_task = {task: [scoring(model, task) for model in pinned.recipe.models] for task in pinned.recipe.scored}
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
