"""Report prompts of each task, counted before anything is trained."""

from __future__ import annotations

import numpy as np

from sft_core.data.sources import splits
from sft_core.data.sources.read import accept
from sft_core.data.sources.registry import source_of
from sft_core.data.sources.rejects import Rejected
from sft_core.parquet import read_table
from sft_core.pins.pinned import PinnedRecipe
from sft_core.store.store import Store
from steps.download import CONVERSATIONS

MAX_SCANNED_BYTES = 256 * 2**20  # larger sources are counted after their download


def count_report_prompts(store: Store, pinned: PinnedRecipe) -> dict[str, int | None]:
    """Unique report prompts of each task; None where a source is not here yet."""
    return {task: _count(store, pinned, task) for task in pinned.recipe.tasks}


def check_report_prompts(counts: dict[str, int | None], pinned: PinnedRecipe) -> None:
    """Raises ValueError for tasks whose scores would rest on too few rows. A smoke run scores what it has."""
    if pinned.recipe.limit:
        return
    minimum = pinned.recipe.evaluation.min_report_rows
    few = {task: count for task, count in counts.items() if count is not None and count < minimum}
    if few:
        counts_text = ", ".join(f"{task} has {count}" for task, count in few.items())
        raise ValueError(
            f"evaluation.min_report_rows: found too few unique report prompts ({counts_text}; at least {minimum} are "
            "needed); raise dataset_mixture.report_share, add data, leave the task out of evaluation.tasks, or "
            "lower evaluation.min_report_rows"
        )


def _count(store: Store, pinned: PinnedRecipe, task: str) -> int | None:
    mixture = pinned.phase({"task": task}).dataset_mixture
    hashes = _prompt_hashes(store, pinned, task)
    if hashes is None:
        return None
    split = splits.assign(hashes, selection_share=mixture.selection_share, report_share=mixture.report_share)
    return len(np.unique(hashes[split == splits.REPORT]))


def _prompt_hashes(store: Store, pinned: PinnedRecipe, task: str) -> np.ndarray | None:
    located = store.locate(CONVERSATIONS, pinned, {"source": task})
    if located.status == "hit" and located.ref is not None:
        with store.open(located.ref, "conversations.parquet") as file:
            return read_table(file, ["prompt_hash"])["prompt_hash"].to_numpy()
    dataset, mixture = pinned.recipe.dataset(task), pinned.phase({"task": task}).dataset_mixture
    rows = source_of(dataset).peek(MAX_SCANNED_BYTES, list(dataset.columns) if dataset.columns else None)
    if rows is None:
        return None
    hashes, num_rejected = [], 0
    for number, (_, raw) in enumerate(rows):
        if number == pinned.recipe.limit:
            break
        try:
            hashes.append(accept(raw, dataset.format).prompt_hash)
        except Rejected:
            num_rejected += 1
    faulty = num_rejected > mixture.max_rejected_share * (len(hashes) + num_rejected)
    # No error here: the download of an empty or faulty source fails with one that names the fault.
    return None if faulty or not hashes else np.array(hashes, dtype=np.uint64)
