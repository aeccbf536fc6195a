"""The scores as a table: typed rows for programs, aligned text for people. Sees plain numbers only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from sft_core.report.flags import Answers, red_flags
from sft_core.report.rows import OverviewRow, Score, ScoreRow
from sft_core.report.shown import in_one_line

LOSSES = ("loss", "perplexity", "token_accuracy")  # every row has them; any other score is one of answers


def score_rows(
    scores: Mapping[str, Mapping[str, Sequence[Score]]],
    differences: Mapping[str, Mapping[str, Mapping[str, float | None]]],
    answers: Mapping[str, Mapping[str, Answers]],
) -> list[ScoreRow]:
    """A row for each task and metric: its score by each model, and how the last model differs from the first.

    scores: {task: {model: its scores}}, the start model first, then the checkpoint of each phase. differences: {task:
    {metric: {value, low, high}}}, last - first with a 95 % interval; a row without one has None. answers: {task:
    {model: counts of its answers}}.
    """
    rows = []
    for task, by_model in scores.items():
        *_, last = by_model
        values = {model: {score["metric"]: score["value"] for score in by_model[model]} for model in by_model}
        for score in by_model[last]:
            metric = score["metric"]
            difference = differences.get(task, {}).get(metric, {})
            row = ScoreRow(
                task,
                metric,
                score["n"],
                {model: round(values[model][metric], 6) for model in by_model},
                stderr=_rounded(score["stderr"]),
                difference=_rounded(difference.get("value")),
                low=_rounded(difference.get("low")),
                high=_rounded(difference.get("high")),
            )
            of_task = answers.get(task)
            of_answers = of_task if of_task and of_task[last].metric == metric else None
            rows.append(dataclasses.replace(row, flags="; ".join(red_flags(row, of_answers)) or None))
    return rows


def overview_rows(scores: Sequence[ScoreRow]) -> list[OverviewRow]:
    """The scores in short: a row for each task, or one for each score of its answers.

    Every flag is there, with its metric where the metric has no column.
    """
    by_task: dict[str, dict[str, ScoreRow]] = {}
    for row in scores:
        by_task.setdefault(row.task, {})[row.metric] = row
    overview = []
    for task, rows in by_task.items():
        models = next(iter(rows.values())).models
        losses: dict[str, float | None] = {**(rows["loss"].by_model if "loss" in rows else dict.fromkeys(models))}
        flags_of_losses = [f"{name}: {rows[name].flags}" for name in LOSSES if name in rows and rows[name].flags]
        for metric in [name for name in rows if name not in LOSSES] or ["loss"]:
            row, is_loss = rows[metric], metric == "loss"
            flags = [*flags_of_losses, *([row.flags] if row.flags and not is_loss else [])]
            flags_of_losses = []
            overview.append(
                OverviewRow(
                    task,
                    row.n,
                    losses,
                    None if is_loss else row.metric,
                    dict.fromkeys(models) if is_loss else {**row.by_model},
                    row.difference,
                    row.low,
                    row.high,
                    "; ".join(flags) or None,
                )
            )
    return overview


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def text_table(header: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    """Columns aligned by width: words to the left, numbers to the right; a row is a line, whatever its cells hold."""
    cells = [tuple(map(in_one_line, header)), *(tuple(in_one_line(_cell(value)) for value in row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    numeric = [
        all(isinstance(row[column], (int, float)) or row[column] is None for row in rows)
        for column in range(len(header))
    ]
    lines = [
        "  ".join(
            cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def markdown_table(header: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    cells = [header, tuple("-" for _ in header), *(tuple(_cell(value) for value in row) for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
