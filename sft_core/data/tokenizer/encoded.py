"""Rows as tokens: rendered text in pieces, and each piece as ids with its part of the mask."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa

from sft_core.data.shards.token_shards import TOKENS, TokenRow
from sft_core.data.tokenizer.tokenizer import Literals, PieceEncoder


@dataclasses.dataclass(frozen=True)
class EncodedRows:
    """Rows of tokens, one after another: row r is ids[offsets[r]:offsets[r + 1]]."""

    ids: np.ndarray  # int32, shape (tokens,)
    trained: np.ndarray  # uint8, shape (tokens,)
    offsets: np.ndarray  # int32, shape (rows + 1,)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> TokenRow:
        if not 0 <= row < len(self):
            raise IndexError(row)
        here = slice(self.offsets[row], self.offsets[row + 1])
        return TokenRow(self.ids[here], self.trained[here])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row: int32, shape (rows,)."""
        return np.diff(self.offsets)

    @property
    def num_trained(self) -> np.ndarray:
        """Trained tokens of each row: int32, shape (rows,)."""
        return np.add.reduceat(self.trained.astype(np.int32), self.offsets[:-1])

    def as_batch(self, weights: pa.Array) -> pa.RecordBatch:
        """The rows as they are stored. weights: lists, of each row's spans."""
        offsets = pa.array(self.offsets)
        columns = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (self.ids, self.trained)]
        return pa.record_batch([*columns, weights], schema=TOKENS)


def encode_rows(encoder: PieceEncoder, rows: dict[str, list[Any]]) -> EncodedRows:
    """Tokens of rendered rows (columns text, spans, cuts, literals). One call encodes the pieces of all rows."""
    pieces: list[str] = []
    trained: list[bool] = []
    literals: dict[int, Literals] = {}
    first_piece = [0]
    for text, spans, cuts, ranges in zip(rows["text"], rows["spans"], rows["cuts"], rows["literals"], strict=True):
        _cut(text, spans, cuts, ranges, pieces, trained, literals)
        first_piece.append(len(pieces))
    encoded = encoder.encode(pieces, literals)
    ids = np.frombuffer(b"".join(encoded), dtype=np.int32)
    lengths = np.array(list(map(len, encoded)), dtype=np.int64) // ids.itemsize
    ends = np.zeros(len(pieces) + 1, dtype=np.int32)
    np.cumsum(lengths, out=ends[1:])
    mask = np.repeat(np.array(trained, dtype=np.uint8), lengths)
    return EncodedRows(ids, mask, ends[first_piece])


def _cut(
    text: str,
    spans: list[int],
    cuts: list[int],
    ranges: list[int],
    pieces: list[str],
    trained: list[bool],
    literals: dict[int, Literals],
) -> None:
    """Appends the text's pieces in order, whether each is trained, and the literals inside it."""
    inside, start = False, 0
    cuts = [cut for cut in cuts if cut not in spans]
    for end in sorted([*spans, *cuts, len(text)]) if cuts else [*spans, len(text)]:
        if end > start:
            if ranges:
                typed = [
                    (begin - start, stop - start)
                    for begin, stop in zip(ranges[::2], ranges[1::2], strict=True)
                    if start <= begin < end
                ]
                if typed:
                    literals[len(pieces)] = typed
            pieces.append(text[start:end])
            trained.append(inside)
            start = end
        if end not in cuts:
            inside = not inside
