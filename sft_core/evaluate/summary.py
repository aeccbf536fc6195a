"""The scores of all tasks in one place: the table, and what thinking gains where both modes have the same prompts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sft_core.evaluate.comparison import differences, mean_difference
from sft_core.evaluate.documents import SAMPLES, document_differences
from sft_core.evaluate.rows import ROWS, answer_counts, of_samples, read_rows
from sft_core.measuring import LM_EVAL
from sft_core.report.tables import HEADER, LOSSES, markdown_table, score_rows

if TYPE_CHECKING:
    from sft_core.store.stage import Build

THINK, NO_THINK = "_think", "_no_think"
GAIN_HEADER = (
    *("task", "n", "no_think", "think", "gain", "low", "high"),
    *("tokens no_think", "tokens think", "cut off no_think", "cut off think"),
)


def build_report(build: Build, *, recipe: str, tasks: list[str]) -> dict[str, Any]:
    """Writes scores.json and report.md, and gives the same rows as counts."""
    found = {
        task: {
            model: json.loads((build.inputs[f"{model}.{task}"] / "scores.json").read_text())
            for model in ("base", "tuned")
        }
        for task in tasks
    }
    paired = [task for task in tasks if not task.startswith(LM_EVAL)]
    compared = {task: compare(build.inputs[f"base.{task}"], build.inputs[f"tuned.{task}"]) for task in tasks}
    counts = {
        task: {model: read_answers(build.inputs[f"{model}.{task}"]) for model in ("base", "tuned")} for task in paired
    }
    scores = score_rows(found, compared, counts)
    gains = thinking_gains({task: build.inputs[f"tuned.{task}"] for task in paired})
    (build.out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    sections = [f"# {recipe}", markdown_table(HEADER, [tuple(row.values()) for row in scores])]
    if gains:
        sections += ["## What thinking gains", markdown_table(GAIN_HEADER, [tuple(row.values()) for row in gains])]
    (build.out / "report.md").write_text("\n\n".join(sections) + "\n")
    return {"scores": scores, "thinking": gains}


def compare(base: Path, tuned: Path) -> dict[str, dict[str, Any]]:
    """{metric: {n, value, low, high}} of two evaluations of a task: tuned - base, with its 95 % interval."""
    if (tuned / SAMPLES).is_file():
        found = document_differences(base, tuned)  # of the harness, which keeps rows of its own
    else:
        found = differences(read_rows(base), read_rows(tuned), read_answers(tuned)["metric"])
    return {metric: dataclasses.asdict(difference) for metric, difference in found.items()}


def read_answers(folder: Path) -> dict[str, Any]:
    """The counts of an evaluation's answers, and the metric by which they are scored; None where none are."""
    metrics = [score["metric"] for score in json.loads((folder / "scores.json").read_text())]
    answered = [metric for metric in metrics if metric not in LOSSES]
    return {**answer_counts(read_rows(folder)), "metric": answered[0] if answered else None}


def thinking_gains(folders: dict[str, Path]) -> list[dict[str, Any]]:
    """The score with and without thinking, for tasks NAME_think and NAME_no_think, paired by prompt, and beside it what
    the answers to these prompts cost: generated tokens as a mean, and the share that was cut off."""
    gains = []
    for task, folder in folders.items():
        twin = task.removesuffix(NO_THINK) + THINK
        if not task.endswith(NO_THINK) or twin not in folders:
            continue
        without, with_thinking = _asked(read_rows(folder)), _asked(read_rows(folders[twin]))
        shared = sorted(without.keys() & with_thinking.keys())
        if len(shared) < 2:
            continue
        sides = [
            pa.Table.from_pylist([rows[prompt] for prompt in shared], schema=ROWS) for rows in (without, with_thinking)
        ]
        before, after = (side["score"].to_numpy() for side in sides)
        gain = mean_difference(before, after)
        tokens, cut_off = ([np.mean(of_samples(side, name)) for side in sides] for name in ("num_generated", "cut_off"))
        values = [before.mean(), after.mean(), gain.value, gain.low, gain.high, *tokens, *cut_off]
        rounded = dict(zip(GAIN_HEADER[2:], (round(float(value), 6) for value in values), strict=True))
        gains.append({"task": task.removesuffix(NO_THINK), "n": len(shared), **rounded})
    return gains


def _asked(rows: pa.Table) -> dict[int, dict[str, Any]]:
    return {row["prompt_hash"]: row for row in rows.to_pylist() if row["score"] is not None}
