"""Token shards: int32 ids and a trained mask for each row, in Arrow files that training maps into memory.

Invariant: a mask changes only where a piece ends, and pieces are encoded one by one, so no token straddles
the border between what is trained and what is not.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from sft_core.data.tokenizer import Literals, PieceEncoder, load_tokenizer

if TYPE_CHECKING:
    from sft_core.store import Build

ROWS_A_SHARD = 20_000
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


def build_tokens(build: Build, *, tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Writes tokens-*.arrow and index.parquet, one row for each rendered row, in the same order."""
    encoder = PieceEncoder(load_tokenizer(**tokenizer))
    source = pq.ParquetFile(build.inputs["rendered"] / "rendered.parquet")
    num_tokens = num_trained = 0
    with (
        source,
        pq.ParquetWriter(build.out / "index.parquet", INDEX, compression="zstd") as index,
        tqdm(total=source.metadata.num_rows, unit=" rows", disable=None, desc="tokenize") as progress,
    ):
        batches = source.iter_batches(batch_size=2000)
        for number, group in enumerate(_grouped(batches, ROWS_A_SHARD)):
            with pa.OSFile(str(build.out / f"tokens-{number:05}.arrow"), "wb") as file, pa.ipc.new_file(file, TOKENS) as shard:
                for batch in group:
                    rows = batch.to_pylist()
                    encoded = encode_rows(encoder, rows)
                    shard.write_batch(_as_batch(encoded))
                    index.write_table(_as_index(rows, encoded))
                    num_tokens += sum(len(row.input_ids) for row in encoded)
                    num_trained += sum(int(row.trained.sum()) for row in encoded)
                    progress.update(len(rows))
        num_rows = source.metadata.num_rows
    return {"rows": num_rows, "tokens": num_tokens, "trained_tokens": num_trained}


@dataclasses.dataclass(frozen=True)
class TokenRow:
    input_ids: np.ndarray  # int32, shape (tokens,)
    trained: np.ndarray  # uint8, shape (tokens,): 1 where the token is a target


def encode_rows(encoder: PieceEncoder, rows: list[dict[str, Any]]) -> list[TokenRow]:
    """Token rows of rendered rows: the pieces of all rows go to the tokenizer in one call."""
    pieces: list[str] = []
    literals: list[Literals] = []
    trained: list[bool] = []
    counts = []
    for row in rows:
        cut = list(_cut(row["text"], row["spans"], row["literals"]))
        counts.append(len(cut))
        for piece, ranges, is_trained in cut:
            pieces.append(piece)
            literals.append(ranges)
            trained.append(is_trained)
    encoded = encoder.encode(pieces, literals)
    result, start = [], 0
    for count in counts:
        parts = encoded[start : start + count]
        ids = np.fromiter((token for part in parts for token in part), dtype=np.int32)
        mask = np.repeat(np.array(trained[start : start + count], dtype=np.uint8), [len(part) for part in parts])
        result.append(TokenRow(ids, mask))
        start += count
    return result


def _cut(text: str, spans: list[int], literals: list[int]) -> Iterator[tuple[str, Literals, bool]]:
    """The text's pieces in order, with the literals inside each and whether it is trained."""
    starts, ends = spans[::2], spans[1::2]
    borders = sorted({0, len(text), *spans})
    for start, end in zip(borders, borders[1:], strict=False):
        inside = [
            (begin - start, stop - start)
            for begin, stop in zip(literals[::2], literals[1::2], strict=True)
            if start <= begin < end
        ]
        span = bisect.bisect_right(starts, start) - 1
        yield text[start:end], inside, span >= 0 and end <= ends[span]


def _grouped(batches: Iterator[pa.RecordBatch], num_rows: int) -> Iterator[list[pa.RecordBatch]]:
    group: list[pa.RecordBatch] = []
    for batch in batches:
        group.append(batch)
        if sum(member.num_rows for member in group) >= num_rows:
            yield group
            group = []
    if group:
        yield group


def _as_batch(rows: list[TokenRow]) -> pa.RecordBatch:
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row.input_ids) for row in rows], out=offsets[1:])
    ids = np.concatenate([row.input_ids for row in rows])
    trained = np.concatenate([row.trained for row in rows])
    return pa.record_batch(
        [pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)) for values in (ids, trained)], schema=TOKENS
    )


def _as_index(rows: list[dict[str, Any]], encoded: list[TokenRow]) -> pa.Table:
    return pa.table(
        {
            "row_id": [row["row_id"] for row in rows],
            "prompt_hash": [row["prompt_hash"] for row in rows],
            "answer": [row["answer"] for row in rows],
            "num_tokens": [len(row.input_ids) for row in encoded],
            "num_trained": [int(row.trained.sum()) for row in encoded],
        },
        schema=INDEX,
    )


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
