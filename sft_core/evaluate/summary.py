"""The report over all tasks: the score table, what each phase changes, and what thinking gains."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pyarrow as pa

from sft_core.evaluate.comparison import differences, mean_difference
from sft_core.evaluate.counts import ReportCounts
from sft_core.evaluate.documents import SAMPLES, document_differences
from sft_core.evaluate.rows import ROWS, ScoredRow, answer_counts, of_samples, read_rows
from sft_core.recipe.evaluation import LM_EVAL
from sft_core.report.flags import Answers
from sft_core.report.rows import PhaseChange, ThinkingGain
from sft_core.report.tables import LOSSES, markdown_table, score_rows

if TYPE_CHECKING:
    from sft_core.store.stage import Build, Json

THINK, NO_THINK = "_think", "_no_think"
GAIN_HEADER = (
    *("task", "n", "no_think", "think", "gain", "low", "high"),
    *("tokens no_think", "tokens think", "cut off no_think", "cut off think"),
)


def build_report(build: Build, *, recipe: str, tasks: list[str], models: list[str]) -> dict[str, Json]:
    """Writes scores.json and report.md, and returns their rows as counts.

    models: the start model first, then the checkpoint of each phase; the last one is released.
    """
    folders = {task: {model: build.inputs[f"{model}.{task}"] for model in models} for task in tasks}
    by_model = {
        task: {model: json.loads((folder / "scores.json").read_text()) for model, folder in of_task.items()}
        for task, of_task in folders.items()
    }
    sources = [task for task in tasks if not task.startswith(LM_EVAL)]
    first, last = models[0], models[-1]
    compared = {task: compare(of_task[first], of_task[last]) for task, of_task in folders.items()}
    answers = {task: {model: read_answers(folder) for model, folder in folders[task].items()} for task in sources}
    rows = score_rows(by_model, compared, answers)
    scores = [row.to_json() for row in rows]
    gains = thinking_gains({task: folders[task][last] for task in sources})
    phases = phase_changes(folders, models) if len(models) > 2 else []
    (build.out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    sections = [f"# {recipe}", *_table(scores)]
    for title, table in (("What each phase changes", phases), ("What thinking gains", gains)):
        sections += [f"## {title}", *_table(table)] if table else []
    (build.out / "report.md").write_text("\n\n".join(sections) + "\n")
    return ReportCounts(scores=rows, thinking=gains, phases=phases).to_json()


def _table(rows: Sequence[Mapping[str, object]]) -> list[str]:
    return [markdown_table(tuple(rows[0]), [tuple(row.values()) for row in rows])] if rows else []


def phase_changes(folders: dict[str, dict[str, Path]], models: list[str]) -> list[PhaseChange]:
    """How each model differs from the one before it: a row for each task, metric and phase.

    folders: {task: {model: an evaluation's folder}}.
    """
    rows: list[PhaseChange] = []
    for task, of_task in folders.items():
        for before, model in itertools.pairwise(models):
            for metric, difference in compare(of_task[before], of_task[model]).items():
                value, low, high = (difference[name] for name in ("value", "low", "high"))
                assert value is not None, "a difference without rows is left out"
                rows.append(
                    PhaseChange(
                        task=task,
                        metric=metric,
                        phase=model,
                        before=before,
                        value=round(value, 6),
                        low=_rounded(low),
                        high=_rounded(high),
                    )
                )
    return rows


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def compare(before: Path, after: Path) -> dict[str, dict[str, float | None]]:
    """{metric: {n, value, low, high}} of two evaluations of a task: after - before, with its 95 % interval."""
    if (after / SAMPLES).is_file():
        by_metric = document_differences(before, after)  # a task of the harness, which writes samples in place of rows
    else:
        by_metric = differences(read_rows(before), read_rows(after), _metric_of_answers(after) or "")
    return {metric: dataclasses.asdict(difference) for metric, difference in by_metric.items()}


def read_answers(folder: Path) -> Answers:
    """The counts of an evaluation's answers."""
    counts = answer_counts(read_rows(folder))
    return Answers(_metric_of_answers(folder), counts["answers"], counts["empty"], counts["cut_off"])


def _metric_of_answers(folder: Path) -> str | None:
    metrics = [score["metric"] for score in json.loads((folder / "scores.json").read_text())]
    return next((metric for metric in metrics if metric not in LOSSES), None)


def thinking_gains(folders: dict[str, Path]) -> list[ThinkingGain]:
    """The scores with and without thinking of tasks NAME_think and NAME_no_think, paired by prompt.

    A row also has the cost of these answers: the mean of generated tokens, and the share of answers cut off.
    """
    gains: list[ThinkingGain] = []
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
        gains.append(cast("ThinkingGain", {"task": task.removesuffix(NO_THINK), "n": len(shared), **rounded}))
    return gains


def _asked(rows: pa.Table) -> dict[int, ScoredRow]:
    """The asked rows by the hash of their prompt."""
    return {row["prompt_hash"]: row for row in rows.to_pylist() if row["score"] is not None}
