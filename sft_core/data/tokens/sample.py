"""A row to look at, with its trained parts, cut so that it fits into a manifest."""

from __future__ import annotations

import itertools
from pathlib import Path

from sft_core.data.shards.parallel import shard_folders
from sft_core.parquet import open_parquet

MAX_PIECES, MAX_CHARACTERS = 24, 800  # of a row, and of each of its pieces


def first_row(rendered: Path) -> list[tuple[str, bool]]:
    """The first row of an output of the render stage, in pieces: text, and whether it is trained."""
    for shard in shard_folders(rendered):
        with open_parquet(shard / "rendered.parquet") as file:
            for batch in file.iter_batches(batch_size=1, columns=["text", "spans"], use_threads=False):
                if batch.num_rows:
                    (row,) = batch.to_pylist()
                    return pieces(row["text"], row["spans"])
    return []


def pieces(text: str, spans: list[int]) -> list[tuple[str, bool]]:
    """The text cut at the spans' borders (start, end, start, end, ...). Long pieces and rows lose their middle."""
    cut = [
        (_shortened(text[start:end]), number % 2 == 1)
        for number, (start, end) in enumerate(itertools.pairwise([0, *spans, len(text)]))
        if end > start
    ]
    if len(cut) <= MAX_PIECES:
        return cut
    half = MAX_PIECES // 2
    return [*cut[:half], (f"\n[... {len(cut) - 2 * half:,} pieces ...]\n", False), *cut[-half:]]


def _shortened(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]}[... {len(text) - 2 * half:,} characters ...]{text[-half:]}"
