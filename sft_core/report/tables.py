"""The scores as a table: plain rows for programs, aligned text for people. Sees plain numbers only."""

from __future__ import annotations

from typing import Any

from sft_core.report.flags import red_flags

HEADER = ("task", "metric", "n", "base", "tuned", "stderr", "difference", "low", "high", "flags")


# A line of the overview: the losses of a task, and one score of its answers.
OVERVIEW = ("task", "n", "base loss", "tuned loss", "metric", "base", "tuned", "difference", "low", "high", "flags")
LOSSES = ("loss", "perplexity", "token_accuracy")  # of every row; any other score is of answers


def score_rows(
    scores: dict[str, dict[str, list[dict[str, Any]]]],
    differences: dict[str, dict[str, dict[str, Any]]],
    answers: dict[str, dict[str, dict[str, Any]]],
) -> list[dict[str, Any]]:
    """A row of HEADER for each score of {task: {"base"|"tuned": [{metric, value, stderr, n}]}}.

    stderr is the tuned score's standard error. differences: {task: {metric: {value, low, high}}}, tuned - base with a
    95 % interval; where there is none, None. answers: {task: {"base"|"tuned": counts of its answers, and their
    metric}}. flags: what a reader must not overlook, in words, or None.
    """
    rows = []
    for task, models in scores.items():
        base = {score["metric"]: score for score in models["base"]}
        for tuned in models["tuned"]:
            metric = tuned["metric"]
            found = differences.get(task, {}).get(metric, {})
            row = {
                "task": task,
                "metric": metric,
                "n": tuned["n"],
                "base": _rounded(base[metric]["value"]),
                "tuned": _rounded(tuned["value"]),
                "stderr": _rounded(tuned["stderr"]),
                "difference": _rounded(found.get("value")),
                "low": _rounded(found.get("low")),
                "high": _rounded(found.get("high")),
            }
            counts = answers.get(task)
            flags = red_flags(row, counts if counts and counts["tuned"]["metric"] == metric else None)
            rows.append({**row, "flags": "; ".join(flags) or None})
    return rows


def overview_rows(scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What to read first of the score table: a row of OVERVIEW a task, or more where its answers have several scores.

    Without one, the difference is that of the losses. Every flag is there, with its metric where that has no column.
    """
    by_task: dict[str, dict[str, dict[str, Any]]] = {}
    for row in scores:
        by_task.setdefault(row["task"], {})[row["metric"]] = row
    found = []
    for task, rows in by_task.items():
        loss = rows.get("loss", {"base": None, "tuned": None})
        told = [f"{name}: {rows[name]['flags']}" for name in LOSSES if name in rows and rows[name]["flags"]]
        for metric in [name for name in rows if name not in LOSSES] or ["loss"]:
            row, is_loss = rows[metric], metric == "loss"
            flags = [*told, *([] if is_loss or not row["flags"] else [row["flags"]])]
            told = []
            shown = {name: None if is_loss else row[name] for name in ("metric", "base", "tuned")}
            losses = {"base loss": loss["base"], "tuned loss": loss["tuned"]}
            change = {name: row[name] for name in ("difference", "low", "high")}
            found.append({"task": task, "n": row["n"], **losses, **shown, **change, "flags": "; ".join(flags) or None})
    return found


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
