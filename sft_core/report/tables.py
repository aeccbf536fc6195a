"""The scores as a table: plain rows for programs, aligned text for people. Sees plain numbers only."""

from __future__ import annotations

from typing import Any

from sft_core.report.flags import red_flags

# What a row of the score table holds besides a score for each model, which stand between the two.
BEFORE_SCORES, AFTER_SCORES = ("task", "metric", "n"), ("stderr", "difference", "low", "high", "flags")
LOSSES = ("loss", "perplexity", "token_accuracy")  # of every row; any other score is of answers


def score_rows(
    scores: dict[str, dict[str, list[dict[str, Any]]]],
    differences: dict[str, dict[str, dict[str, Any]]],
    answers: dict[str, dict[str, dict[str, Any]]],
) -> list[dict[str, Any]]:
    """A row for each task and metric: its score by each model, and how the last model differs from the first.

    scores: {task: {model: [{metric, value, stderr, n}]}}, the start model first, then the checkpoint of each phase.
    stderr is the last model's standard error. differences: {task: {metric: {value, low, high}}}, last - first with a
    95 % interval; where there is none, None. answers: {task: {model: counts of its answers, and their metric}}.
    flags: what a reader must not overlook, in words, or None.
    """
    rows = []
    for task, by_model in scores.items():
        *_, last = by_model
        values = {model: {score["metric"]: score["value"] for score in by_model[model]} for model in by_model}
        for score in by_model[last]:
            metric = score["metric"]
            difference = differences.get(task, {}).get(metric, {})
            row = {
                "task": task,
                "metric": metric,
                "n": score["n"],
                **{model: _rounded(values[model][metric]) for model in by_model},
                "stderr": _rounded(score["stderr"]),
                "difference": _rounded(difference.get("value")),
                "low": _rounded(difference.get("low")),
                "high": _rounded(difference.get("high")),
            }
            counts = answers.get(task)
            flags = red_flags(row, [*by_model], counts if counts and counts[last]["metric"] == metric else None)
            rows.append({**row, "flags": "; ".join(flags) or None})
    return rows


def models_of(row: dict[str, Any]) -> list[str]:
    """The models of a row of the score table, the start model first."""
    return [name for name in row if name not in (*BEFORE_SCORES, *AFTER_SCORES)]


def overview_rows(scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What to read first of the score table: a row a task, or more where its answers have several scores.

    It has the task's losses by each model (`MODEL loss`), one score of its answers by each, and the difference.

    Without one, the difference is that of the losses. Every flag is there, with its metric where that has no column.
    """
    by_task: dict[str, dict[str, dict[str, Any]]] = {}
    for row in scores:
        by_task.setdefault(row["task"], {})[row["metric"]] = row
    overview = []
    for task, rows in by_task.items():
        models = models_of(next(iter(rows.values())))
        loss = rows.get("loss", dict.fromkeys(models))
        of_losses = [f"{name}: {rows[name]['flags']}" for name in LOSSES if name in rows and rows[name]["flags"]]
        for metric in [name for name in rows if name not in LOSSES] or ["loss"]:
            row, is_loss = rows[metric], metric == "loss"
            flags = [*of_losses, *([] if is_loss or not row["flags"] else [row["flags"]])]
            of_losses = []
            shown = {name: None if is_loss else row[name] for name in ("metric", *models)}
            losses = {f"{model} loss": loss[model] for model in models}
            change = {name: row[name] for name in ("difference", "low", "high")}
            overview.append(
                {"task": task, "n": row["n"], **losses, **shown, **change, "flags": "; ".join(flags) or None}
            )
    return overview


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def text_table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """Columns aligned by width: words to the left, numbers to the right."""
    cells = [header, *(tuple(_cell(value) for value in row) for row in rows)]
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


def markdown_table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    cells = [header, tuple("-" for _ in header), *(tuple(_cell(value) for value in row) for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
