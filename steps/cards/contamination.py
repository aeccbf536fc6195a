"""Training rows that contain report prompts, on the card of mix."""

from __future__ import annotations

from typing import Any

from sft_core.data.overlap.decontamination import ContaminationCounts
from sft_core.store.ref import Ref
from sft_core.store.store import Store
from steps.cards.pieces import heading, table


def card(store: Store, refs: dict[str, Ref]) -> list[Any]:
    """Contaminated rows by source and task, and some examples. refs: by source."""
    by_source = {source: ContaminationCounts.from_json(store.manifest(ref)["counts"]) for source, ref in refs.items()}
    by_task = [(source, task, rows) for source, counts in by_source.items() for task, rows in counts.tasks.items()]
    if not by_task:
        return [heading("Contaminated rows: none")]
    examples = []
    for source, counts in by_source.items():
        for example in counts.examples:
            row, prompt = f"{source} {example.row_id[:12]}", f"{example.task} {example.report_row_id[:12]}"
            title = f"{row} holds {example.coverage:.2f} of {prompt}"
            examples.append((title, example.text, example.prompt, example.ngram))
    num_contaminated = sum(counts.contaminated for counts in by_source.values())
    num_rows = sum(counts.rows for counts in by_source.values())
    return [
        heading(f"Contaminated: {num_contaminated} conversations of {num_rows}"),
        table(("left out of", "holds prompts of", "conversations"), by_task),
        heading("Some contaminated rows"),
        table(("left out", "its text", "the prompt", "in both"), examples[:12]),
    ]
