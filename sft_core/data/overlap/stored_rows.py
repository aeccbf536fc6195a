"""The stored conversations of a source."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from sft_core.data.sources.formats.canonical import Conversation
from sft_core.parquet import open_parquet, read_table

_FILE = "conversations.parquet"


def read_column(folder: Path, column: str) -> pa.ChunkedArray:
    return read_table(folder / _FILE, [column])[column]


def count_row_groups(folder: Path) -> int:
    with open_parquet(folder / _FILE) as file:
        return file.num_row_groups


def read_groups(
    folder: Path, first_group: int, end_group: int, columns: tuple[str, ...] = ()
) -> Iterator[tuple[list[Conversation], pa.Table]]:
    """The conversations of some row groups, a group at a time, and further columns of their rows."""
    with open_parquet(folder / _FILE) as file:
        for group in range(first_group, end_group):
            table = file.read_row_group(group, columns=["conversation", *columns], use_threads=False)
            yield list(map(json.loads, table["conversation"].to_pylist())), table.drop_columns("conversation")


def read_places(folder: Path, places: np.ndarray) -> Iterator[tuple[int, list[Conversation]]]:
    """Conversations by their ascending row numbers, a row group at a time: the index in `places` of the first, and the
    conversations."""
    with open_parquet(folder / _FILE) as file:
        end = 0
        for group in range(file.num_row_groups):
            start, end = end, end + file.metadata.row_group(group).num_rows
            first, last = np.searchsorted(places, (start, end))
            if first < last:
                column = file.read_row_group(group, columns=["conversation"], use_threads=False)["conversation"]
                yield int(first), list(map(json.loads, column.take(places[first:last] - start).to_pylist()))
