"""Rendered rows as the columns that the tokenize stage reads."""

from typing import Any

from sft_core.data.rendering.spans import RenderedRow


def columns(*rows: RenderedRow) -> dict[str, list[Any]]:
    return {
        "text": [row.text for row in rows],
        "spans": [[offset for span in row.spans for offset in span] for row in rows],
        "cuts": [row.cuts for row in rows],
        "weights": [row.weights for row in rows],
        "literals": [[offset for span in row.literals for offset in span] for row in rows],
        "conversation": list(range(len(rows))),
        "row_id": [f"row {number}" for number in range(len(rows))],
    }
