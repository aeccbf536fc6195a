"""report: each task's scores by the start model and each phase's checkpoint, and what thinking gains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sft_core.evaluate.summary import GAIN_HEADER, build_report
from sft_core.report.rows import ScoreRow, ThinkingGain
from sft_core.report.shown import shown
from sft_core.report.tables import overview_rows, text_table
from sft_core.store.stage import Stage
from steps.colour import last_column_red
from steps.scored import scored_tasks, scorings

REPORT = Stage(
    "report",
    build_report,
    section=lambda pinned, part: {
        "recipe": pinned.recipe.name,
        "tasks": scored_tasks(pinned, part),
        "models": pinned.recipe.models,
    },
    needs=scorings,
)


def flagged(scores: Sequence[ScoreRow]) -> list[str]:
    """A line for each red flag, with the tasks and metrics that have it."""
    metrics_by_flag: dict[str, dict[str, list[str]]] = {}
    for row in scores:
        for flag in (row.flags or "").split("; "):
            if flag:
                metrics_by_flag.setdefault(flag, {}).setdefault(row.task, []).append(row.metric)
    return [
        f"{flag}: " + ", ".join(f"{task} ({', '.join(metrics)})" for task, metrics in by_task.items())
        for flag, by_task in metrics_by_flag.items()
    ]


def failures(failed: dict[str, str]) -> str:
    """The text with which a run ends if tasks are not scored. failed: {task: why}."""
    return "\n".join(
        [
            f"{len(failed)} of the tasks could not be evaluated:",
            *(f"  {task}: {reason}" for task, reason in failed.items()),
            "The others are scored; the checkpoint is there, its card names what is missing, and it is not pushed.",
            "The tasks' logs and cards hold the tracebacks: python flows/sft_flow.py card view evaluate",
            "Once the cause is gone, `sft resume` evaluates these tasks again; so does a new run: the rest is a hit.",
        ]
    )


def summary(
    scores: Sequence[Mapping[str, Any]],
    gains: Sequence[ThinkingGain],
    checkpoint: str,
    pushed: str | None = None,
    whole: bool = False,
) -> str:
    """The text that a run prints last.

    scores: rows as ScoreRow.to_json gives them. pushed: the checkpoint's address on the hub, if it is there. whole:
    print every score.
    """
    typed = [ScoreRow.from_json(row) for row in scores]
    rows = [row.to_json() for row in (typed if whole else overview_rows(typed))]
    parts = []
    if rows:
        first, *_, last = typed[0].models
        header = tuple(rows[0])
        parts = [
            f"{last} - {first} is the difference, of losses where there are no answers, with its paired 95 % interval:",
            last_column_red(text_table(header, [tuple(row.values()) for row in rows]), header[-1]),
        ]
    if gains:
        parts.append("What thinking gains (mean score, paired 95 % interval; generated tokens; share cut off):")
        parts.append(text_table(GAIN_HEADER, [tuple(row.values()) for row in gains]))
    parts.append(shown(f"checkpoint: {checkpoint}" + (f"\npushed: {pushed}" if pushed else "")))
    parts.append("perplexity and token accuracy: sft scores --all; what was answered: sft answers latest")
    parts.append("cards: python flows/sft_flow.py card view report (or train, pack, mix, evaluate, tokenize)")
    return "\n\n".join(["", *parts])
