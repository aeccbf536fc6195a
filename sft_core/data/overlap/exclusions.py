"""Token rows that are left out of the mixture, by reason. All rows of a conversation are left out together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft_core.data.shards.parallel import shard_folders
from sft_core.parquet import read_table

REASONS = ("duplicates", "contaminated")


def left_out(inputs: Mapping[str, Path], source: str, row_ids: pa.ChunkedArray) -> dict[str, np.ndarray]:
    """For each reason, whether it excludes each row: bool, shape (rows,). A row has one reason, the first that applies.

    row_ids: of the source's token rows, in order. inputs: folders of the stages `duplicates` and
    `contaminated:<source>`, if the recipe has them.
    """
    duplicates = np.zeros(len(row_ids), bool)
    contaminated = np.zeros(len(row_ids), bool)
    if "duplicates" in inputs:
        table = read_table(inputs["duplicates"] / "duplicates.parquet")
        duplicates = _duplicates(table.filter(pc.field("source") == source), source, row_ids)
    if (folder := inputs.get(f"contaminated:{source}")) is not None:
        for shard in shard_folders(folder):
            table = read_table(shard / "contamination.parquet", ["row_id"])
            contaminated |= _is_among(row_ids, table["row_id"])
    return {"duplicates": duplicates, "contaminated": contaminated & ~duplicates}


def _duplicates(table: pa.Table, source: str, row_ids: pa.ChunkedArray) -> np.ndarray:
    of_itself = pc.and_(pc.equal(table["of_source"], source), pc.equal(table["of_row_id"], table["row_id"]))
    is_duplicate = _is_among(row_ids, table["row_id"].filter(pc.invert(of_itself)))
    # Copies of a conversation in one source have the same row_id and the same number of rows; the first copy is kept.
    copies = Counter(table["row_id"].filter(of_itself).to_pylist())
    places: dict[str, list[int]] = {}
    for place in np.flatnonzero(_is_among(row_ids, pa.chunked_array([pa.array(copies, pa.string())]))).tolist():
        places.setdefault(row_ids[place].as_py(), []).append(place)
    for row_id, rows in places.items():
        is_duplicate[rows[len(rows) // (copies[row_id] + 1) :]] = True
    return is_duplicate


def _is_among(row_ids: pa.ChunkedArray, those: pa.ChunkedArray) -> np.ndarray:
    return pc.is_in(row_ids, value_set=those.combine_chunks()).to_numpy().astype(bool)
