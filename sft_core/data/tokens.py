"""Rendered rows as token shards.

Invariant: a mask changes only where a piece ends, and pieces are encoded one by one, so no token straddles
the border between what is trained and what is not.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from sft_core.data.shards import INDEX, TOKENS, TokenRow
from sft_core.data.tokenizer import Literals, PieceEncoder, load_tokenizer

if TYPE_CHECKING:
    from sft_core.store import Build

ROWS_A_SHARD = 20_000


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
            with (
                pa.OSFile(str(build.out / f"tokens-{number:05}.arrow"), "wb") as file,
                pa.ipc.new_file(file, TOKENS) as shard,
            ):
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
    for start, end in itertools.pairwise(borders):
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
