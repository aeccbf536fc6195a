"""A row to look at: small enough for a manifest, whatever its length, with what of it is trained."""

from __future__ import annotations

import itertools
from pathlib import Path

import pyarrow.parquet as pq

from sft_core.data.shards.parallel import shard_folders

MAX_PIECES, MAX_CHARACTERS = 24, 800  # of a row, and of each of its pieces


def first_row(rendered: Path) -> list[tuple[str, bool]]:
    """The first row of an output of the render stage: text and whether it is trained, piece after piece."""
    for shard in shard_folders(rendered):
        with pq.ParquetFile(shard / "rendered.parquet") as file:
            for batch in file.iter_batches(batch_size=1, columns=["text", "spans"]):
                if batch.num_rows:
                    (row,) = batch.to_pylist()
                    return pieces(row["text"], row["spans"])
    return []


def pieces(text: str, spans: list[int]) -> list[tuple[str, bool]]:
    """The text cut at the spans' borders (start, end, start, end, ...); the middle of what is long is left out."""
    found = [
        (_shortened(text[start:end]), number % 2 == 1)
        for number, (start, end) in enumerate(itertools.pairwise([0, *spans, len(text)]))
        if end > start
    ]
    if len(found) <= MAX_PIECES:
        return found
    half = MAX_PIECES // 2
    return [*found[:half], (f"\n[... {len(found) - 2 * half:,} pieces ...]\n", False), *found[-half:]]


def _shortened(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]}[... {len(text) - 2 * half:,} characters ...]{text[-half:]}"
