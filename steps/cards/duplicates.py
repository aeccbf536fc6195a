"""Training rows that repeat others, on the card of mix."""

from __future__ import annotations

from typing import Any

from sft_core.data.overlap.deduplication import DuplicateCounts
from sft_core.store.ref import Ref
from sft_core.store.store import Store
from steps.cards.pieces import heading, table


def card(store: Store, ref: Ref) -> list[Any]:
    """Duplicates by pair of sources, and some examples."""
    counts = DuplicateCounts.from_json(store.manifest(ref)["counts"])
    if not counts.pairs:
        return [heading("Duplicates: none")]
    pairs = [(pair.source, pair.of, pair.kind, pair.rows) for pair in counts.pairs]
    examples = []
    for example in counts.examples:
        row = f"{example.source} {example.row_id[:12]}"
        repeated = f"{example.of_source} {example.of_row_id[:12]}"
        title = f"{row} repeats {repeated}: {example.kind}, {example.similarity:.2f}"
        examples.append((title, example.text, example.of_text))
    return [
        heading(f"Duplicates: {counts.exact} exact and {counts.near} near, of {counts.rows} conversations"),
        table(("left out of", "repeats", "kind", "conversations"), pairs),
        heading("Some duplicates"),
        table(("left out", "its text", "the text that it repeats"), examples),
    ]
