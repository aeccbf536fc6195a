"""Which training rows hold report prompts, on the card of mix."""

from __future__ import annotations

from typing import Any

from sft_core.store.ref import Ref
from sft_core.store.store import Store
from steps.cards.pieces import heading, table


def card(store: Store, refs: dict[str, Ref]) -> list[Any]:
    """Which source holds which task's prompts, and some of the rows. refs: of each source."""
    counts = {source: store.manifest(ref)["counts"] for source, ref in refs.items()}
    held = [(source, task, rows) for source, one in counts.items() for task, rows in one["tasks"].items()]
    if not held:
        return [heading("Contaminated rows: none")]
    examples = []
    for source, found in counts.items():
        for one in found["examples"]:
            row, prompt = f"{source} {one['row_id'][:12]}", f"{one['task']} {one['report_row_id'][:12]}"
            told = f"{row} holds {one['coverage']:.2f} of {prompt}"
            examples.append((told, one["text"], one["prompt"], one["ngram"]))
    num_rows = sum(one["contaminated"] for one in counts.values())
    return [
        heading(f"Contaminated: {num_rows} conversations of {sum(one['rows'] for one in counts.values())}"),
        table(("left out of", "holds prompts of", "conversations"), held),
        heading("Some contaminated rows"),
        table(("left out", "its text", "the prompt", "in both"), examples[:12]),
    ]
