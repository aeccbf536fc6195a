"""report: each task's scores from the start model to the last phase's checkpoint, and what thinking gains."""

from __future__ import annotations

from typing import Any

from sft_core.evaluate.summary import GAIN_HEADER, build_report
from sft_core.report.tables import models_of, overview_rows, text_table
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


def flagged(scores: list[dict[str, Any]]) -> list[str]:
    """The red flags of a score table, one a line, with the tasks and metrics that have it."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in scores:
        for flag in (row["flags"] or "").split("; "):
            if flag:
                found.setdefault(flag, {}).setdefault(row["task"], []).append(row["metric"])
    return [
        f"{flag}: " + ", ".join(f"{task} ({', '.join(metrics)})" for task, metrics in tasks.items())
        for flag, tasks in found.items()
    ]


def failures(failed: dict[str, str]) -> str:
    """What the run ends with where tasks are not scored. failed: {task: why}."""
    told = [f"  {task}: {reason}" for task, reason in failed.items()]
    return "\n".join(
        [
            f"{len(failed)} of the tasks could not be evaluated:",
            *told,
            "The others are scored; the checkpoint is there, its card names what is missing, and it is not pushed.",
            "The tasks' logs and cards hold the tracebacks: python flows/sft_flow.py card view evaluate",
            "Once the cause is gone, `sft resume` evaluates these tasks again; so does a new run: the rest is a hit.",
        ]
    )


def summary(
    scores: list[dict[str, Any]],
    gains: list[dict[str, Any]],
    checkpoint: str,
    pushed: str | None = None,
    whole: bool = False,
) -> str:
    """What the run prints last. pushed: the checkpoint's address on the hub, if it is there. whole: every score."""
    rows = scores if whole else overview_rows(scores)
    parts = []
    if rows:
        first, *_, last = models_of(scores[0])
        header = tuple(rows[0])
        parts = [
            f"{last} - {first} is the difference, of losses where there are no answers, with its paired 95 % interval:",
            last_column_red(text_table(header, [tuple(row.values()) for row in rows]), header[-1]),
        ]
    if gains:
        parts.append("What thinking gains (mean score, paired 95 % interval; generated tokens; share cut off):")
        parts.append(text_table(GAIN_HEADER, [tuple(row.values()) for row in gains]))
    parts.append(f"checkpoint: {checkpoint}" + (f"\npushed: {pushed}" if pushed else ""))
    parts.append("perplexity and token accuracy: sft scores --all; what was answered: sft answers latest")
    parts.append("cards: python flows/sft_flow.py card view report (or train, pack, mix, evaluate, tokenize)")
    return "\n\n".join(["", *parts])
