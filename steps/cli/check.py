"""`sft check`: what the mask proof checked of each source."""

from __future__ import annotations

import dataclasses
from typing import Any

from sft_core.pins.pinned import PinnedRecipe
from sft_core.report.tables import text_table
from sft_core.store.store import Store
from steps.tokenize import TOKENS, proved

_COLUMNS = {
    "source": "source",
    "conversations": "conversations",
    "rejected": "rejected",
    "rows": "rows checked",
    "turns": "turns",
    "prompts": "prompts",
    "forms": "forms",
    "trained_share": "trained",
    "rows_added": "rows added",
    "duplicated_tokens": "context repeated",
    "control_tokens_kept_as_text": "typed control",
}


def checked(store: Store, pinned: PinnedRecipe, source: str) -> dict[str, Any]:
    """What was checked of a source, as `--json` prints it. Builds the source's tokens, with their proof, if need be.

    Raises MaskProofFailed, and CorruptOutput for a stored shard whose bytes have changed.
    """
    ref = store.ensure(TOKENS, pinned, source=source)
    store.verify(ref)
    return {"source": source, **dataclasses.asdict(proved(store, ref))}


def check_text(rows: list[dict[str, Any]]) -> str:
    """A table of `checked` sources, and a line of totals."""
    shown = [{**row, "trained_share": f"{row['trained_share']:.1%}"} for row in rows]
    table = text_table(tuple(_COLUMNS.values()), [tuple(row[column] for column in _COLUMNS) for row in shown])
    num_rows, num_turns = (sum(row[count] for row in rows) for count in ("rows", "turns"))
    num_tokens, num_trained = (sum(row[count] for row in rows) for count in ("tokens", "trained_tokens"))
    share = f"{num_trained:,} of {num_tokens:,} tokens trained ({num_trained / max(1, num_tokens):.1%})"
    return f"{table}\n\nall {num_rows:,} rows proved: {num_turns:,} turns, {share}; the shards are as they were written"
