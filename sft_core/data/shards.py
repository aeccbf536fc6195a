"""Token shards: int32 ids and a trained mask for each row, in Arrow files that a reader maps into memory."""

from __future__ import annotations

import bisect
import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TOKENS = pa.schema([("input_ids", pa.list_(pa.int32())), ("trained", pa.list_(pa.uint8()))])
INDEX = pa.schema(
    [
        ("row_id", pa.string()),
        ("prompt_hash", pa.uint64()),
        ("answer", pa.string()),
        ("num_tokens", pa.int32()),
        ("num_trained", pa.int32()),
    ]
)


@dataclasses.dataclass(frozen=True)
class TokenRow:
    input_ids: np.ndarray  # int32, shape (tokens,)
    trained: np.ndarray  # uint8, shape (tokens,): 1 where the token is a target


def read_index(folder: Path) -> pa.Table:
    """The index of a source's shards: one row for each token row, in order."""
    return pq.read_table(folder / "index.parquet")


class TokenShards:
    """Rows of one source's shards by number, mapped and not copied."""

    def __init__(self, folder: Path):
        self._batches: list[pa.RecordBatch] = []
        for path in sorted(folder.glob("tokens-*.arrow")):
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
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
        return TokenRow(*(_values(batch.column(column), local) for column in (0, 1)))


def _values(column: pa.ListArray, row: int) -> np.ndarray:
    start, end = column.offsets[row].as_py(), column.offsets[row + 1].as_py()
    return column.values.to_numpy(zero_copy_only=True)[start:end]
