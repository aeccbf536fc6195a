"""The scores as a table: plain rows for programs, aligned text for people. Sees plain numbers only."""

from __future__ import annotations

from typing import Any

HEADER = ("task", "metric", "n", "base", "tuned", "stderr")


def score_rows(scores: dict[str, dict[str, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """[{task, metric, n, base, tuned, stderr}] of {task: {"base"|"tuned": [{metric, value, stderr, n}]}}.

    stderr is the tuned score's standard error.
    """
    rows = []
    for task, models in scores.items():
        base = {score["metric"]: score for score in models["base"]}
        for tuned in models["tuned"]:
            rows.append(
                {
                    "task": task,
                    "metric": tuned["metric"],
                    "n": tuned["n"],
                    "base": round(base[tuned["metric"]]["value"], 6),
                    "tuned": round(tuned["value"], 6),
                    "stderr": None if tuned["stderr"] is None else round(tuned["stderr"], 6),
                }
            )
    return rows


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
