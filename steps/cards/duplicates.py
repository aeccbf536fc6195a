"""Which training rows repeat others, on the card of mix."""

from __future__ import annotations

from typing import Any

from sft_core.store.ref import Ref
from sft_core.store.store import Store
from steps.cards.pieces import heading, table


def card(store: Store, ref: Ref) -> list[Any]:
    """What repeats what: rows by pair of sources, and some of them."""
    counts = store.manifest(ref)["counts"]
    if not counts["pairs"]:
        return [heading("Duplicates: none")]
    pairs = [(pair["source"], pair["of"], pair["kind"], pair["rows"]) for pair in counts["pairs"]]
    examples = []
    for one in counts["examples"]:
        row, repeated = (f"{one[f'{of}source']} {one[f'{of}row_id'][:12]}" for of in ("", "of_"))
        told = f"{row} repeats {repeated}: {one['kind']}, {one['similarity']:.2f}"
        examples.append((told, one["text"], one["of_text"]))
    return [
        heading(f"Duplicates: {counts['exact']} exact and {counts['near']} near, of {counts['rows']} conversations"),
        table(("left out of", "repeats", "kind", "conversations"), pairs),
        heading("Some duplicates"),
        table(("left out", "its text", "the text that it repeats"), examples),
    ]
