"""Token shards: int32 ids and a trained mask for each row, in Arrow files that readers map into memory."""

from __future__ import annotations

import bisect
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from sft_core.data.shards.parallel import shard_folders
from sft_core.parquet import read_table

TOKENS = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.uint8())),
        ("weights", pa.list_(pa.float32())),  # of each trained run; empty: all are 1
    ]
)
INDEX = pa.schema(
    [
        ("row_id", pa.string()),
        ("prompt_hash", pa.uint64()),
        ("answer", pa.string()),
        ("num_tokens", pa.int32()),
        ("num_trained", pa.int32()),
    ]
)
WINDOWS = pa.schema([("of_row", pa.int32()), ("num_tokens", pa.int32()), ("num_trained", pa.int32())])


@dataclasses.dataclass(frozen=True)
class TokenRow:
    input_ids: np.ndarray  # int32, shape (tokens,)
    trained: np.ndarray  # uint8, shape (tokens,): 1 where the token is a target
    run_weights: np.ndarray | None = None  # float32, shape (trained runs,) or more of them; None: all are 1

    @property
    def weights(self) -> np.ndarray:
        """How much each token counts in the loss: float32, shape (tokens,), 0 where it is not trained."""
        if self.run_weights is None:
            return self.trained.astype(np.float32)
        run = np.cumsum(np.diff(self.trained.astype(np.int8), prepend=0) == 1) - 1
        return np.where(self.trained == 1, self.run_weights[run], np.float32(0))

    def first(self, num_tokens: int) -> TokenRow:
        return TokenRow(self.input_ids[:num_tokens], self.trained[:num_tokens], self.run_weights)


def read_index(folder: Path, columns: list[str] | None = None, shards: list[int] | None = None) -> pa.Table:
    """The index of a source's shards, or of the given ones: a row for each token row, in order."""
    folders = shard_folders(folder)
    chosen = folders if shards is None else [folders[number] for number in shards]
    return pa.concat_tables(read_table(shard / "index.parquet", columns) for shard in chosen)


def row_ids(folders: Sequence[Path], rows: np.ndarray) -> list[str]:
    """The row_id of each token row. folders: as TokenShards takes them; a window has the id of its row."""
    tokens, *windows = folders
    ids = read_index(tokens, ["row_id"])["row_id"]
    if windows:
        of_row = np.concatenate([np.arange(len(ids)), read_windows(tokens, *windows).of_row])
        rows = of_row[rows]
    return ids.take(rows).to_pylist()


class TokenShards:
    """Token rows of a source by number, mapped and not copied; the rows of a second folder come after the first's."""

    def __init__(self, *folders: Path):
        self._batches: list[pa.RecordBatch] = []
        for shard in [shard for folder in folders for shard in shard_folders(folder)]:
            reader = pa.ipc.open_file(pa.memory_map(str(shard / "tokens.arrow")))
            self._batches += [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._ends = np.cumsum([batch.num_rows for batch in self._batches]).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> TokenRow:
        if not 0 <= row < len(self):
            raise IndexError(row)
        number = bisect.bisect_right(self._ends, row)
        batch = self._batches[number]
        local = row - (self._ends[number] - batch.num_rows)
        ids, trained, weights = (_values(batch.column(column), local) for column in range(3))
        return TokenRow(ids, trained, weights if len(weights) else None)

    def num_targets(self, rows: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
        """Trained tokens among each row's first `num_tokens`: int64, shape (rows,).

        A row's first token does not count, for nothing predicts it.
        """
        counts, first = np.zeros(len(rows), np.int64), 0
        for batch, end in zip(self._batches, self._ends, strict=True):
            here = np.flatnonzero((rows >= first) & (rows < end))
            trained = batch.column(1)
            before = np.append(0, np.cumsum(trained.values.to_numpy(zero_copy_only=True), dtype=np.int64))
            starts = trained.offsets.to_numpy()[rows[here] - first].astype(np.int64)
            counts[here] = before[starts + num_tokens[here]] - before[starts + 1]
            first = end
        return counts


def _values(column: pa.ListArray, row: int) -> np.ndarray:
    start, end = column.offsets[row].as_py(), column.offsets[row + 1].as_py()
    return column.values.to_numpy(zero_copy_only=True)[start:end]


class Windows(NamedTuple):
    """The windows of a source's over-long rows, in the order of the rows. A window's place here is its row number."""

    of_row: np.ndarray  # int64, shape (windows,): the token row that the window is cut from
    num_tokens: np.ndarray  # int32, shape (windows,)
    num_trained: np.ndarray  # int32, shape (windows,)


def read_windows(tokens: Path, windows: Path) -> Windows:
    """tokens, windows: folders of the source's outputs."""
    parts, first_row = [], 0
    for shard, of_tokens in zip(shard_folders(windows), shard_folders(tokens), strict=True):
        table = read_table(shard / "windows.parquet")
        of_row, num_tokens, num_trained = (table[name].to_numpy() for name in WINDOWS.names)
        parts.append((of_row.astype(np.int64) + first_row, num_tokens, num_trained))
        first_row += json.loads((of_tokens / "counts.json").read_text())["rows"]
    return Windows(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
