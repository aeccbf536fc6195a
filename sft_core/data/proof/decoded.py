"""Token rows read back as the bytes of their ids, with a mark before each control token.

Invariant: the bytes depend on the ids alone. Text that only looks like a control token has no mark.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from sft_core.data.tokenizer.tokenizer import any_of, control_tokens, decoder_kinds, token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from sft_core.data.tokenizer.encoded import EncodedRows

MARK = b"\xff"  # a byte that no UTF-8 text has
_NO_MARK = b"\xfe"  # replaces that byte in the vocabulary; no UTF-8 text has it either
WORD_START = "\u2581"  # what SentencePiece writes for a space


class Piece(NamedTuple):
    """A part of a row to be shown. All of it is trained or none, and control tokens or text."""

    text: str
    is_trained: bool
    is_control: bool = False


class Turn(NamedTuple):
    """A trained part of a row up to its first stop token: its place in tokens and in bytes."""

    first: int  # tokens: first to last, exclusive
    last: int
    start: int  # bytes: start to end, exclusive; the stop token is stop to end
    stop: int
    end: int
    is_stopped: bool  # whether its last token is a stop token


class Vocabulary:
    """The tokenizer's ids as bytes, and texts as they read after encoding."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        control = control_tokens(tokenizer)
        texts = [text.replace(MARK, _NO_MARK) for text in token_bytes(tokenizer)]
        for text, index in control.items():
            texts[index] = MARK + text.encode()
        self.bytes = pa.array(texts, pa.large_binary())
        self.control = any_of(control)
        self._normalizer = tokenizer.backend_tokenizer.normalizer
        self._is_byte_level = "ByteLevel" in decoder_kinds(tokenizer)

    def is_blank(self, data: bytes) -> bool:
        """Whether the data has nothing but control tokens and white space."""
        return not self.control.sub("", data.replace(MARK, b"").decode("utf-8", "replace")).strip()

    def normalized(self, text: str) -> str:
        """The text as its ids read, for a tokenizer that cannot write every text unchanged."""
        text = text if self._normalizer is None else self._normalizer.normalize_str(text)
        return text if self._is_byte_level else text.replace(WORD_START, " ")

    def marked(self, text: str, *, normalize: bool = False) -> bytes:
        """The bytes of a row of this text in which each control token is a token, not typed text."""
        parts, position = [], 0
        for match in self.control.finditer(text):
            parts += [text[position : match.start()], match[0]]
            position = match.end()
        parts.append(text[position:])
        plain = [self.normalized(part) for part in parts[::2]] if normalize else parts[::2]
        control = [MARK + part.encode() for part in parts[1::2]]
        return b"".join(part for pair in zip(map(str.encode, plain), [*control, b""], strict=True) for part in pair)


class DecodedRows:
    """The rows of a group as bytes."""

    def __init__(self, vocabulary: Vocabulary, encoded: EncodedRows):
        self.encoded = encoded
        _, offsets, data = vocabulary.bytes.take(pa.array(encoded.ids)).buffers()
        self._ends = np.frombuffer(offsets, dtype=np.int64)[: len(encoded.ids) + 1]  # of the tokens before each token
        self._data = memoryview(data) if data is not None else memoryview(b"")

    def row(self, row: int) -> bytes:
        start, end = self._ends[self.encoded.offsets[row : row + 2]]
        return bytes(self._data[start:end])

    def turns(self, stop_ids: np.ndarray) -> list[list[Turn]]:
        """The trained turns of each row."""
        trained, is_stop = self.encoded.trained != 0, np.isin(self.encoded.ids, stop_ids)
        row_starts = self.encoded.offsets
        # A turn ends at a stop token, before a masked token and at the end of its row; the next turn begins after it.
        breaks = np.ones(len(trained) + 1, dtype=bool)
        breaks[1:-1] = is_stop[:-1] | (trained[:-1] != trained[1:])
        breaks[row_starts] = True
        first, last = np.flatnonzero(breaks[:-1] & trained), np.flatnonzero(breaks[1:] & trained) + 1
        row = np.searchsorted(row_starts, first, side="right") - 1
        before = row_starts[row]
        columns = [first - before, last - before]
        columns += [self._ends[place] - self._ends[before] for place in (first, last - 1, last)]
        turns: list[list[Turn]] = [[] for _ in range(len(self.encoded))]
        fields = zip(*(column.tolist() for column in (*columns, is_stop[last - 1])), strict=True)
        for number, turn in zip(row.tolist(), map(Turn._make, fields), strict=True):
            turns[number].append(turn)
        return turns

    def pieces(self, row: int, around: tuple[int, int] | None = None) -> list[Piece]:
        """The row in pieces to be shown. around: show only the tokens at these bytes, and count the others."""
        begin, end = self.encoded.offsets[row : row + 2]
        ends = self._ends[begin : end + 1] - self._ends[begin]
        num_tokens = len(ends) - 1
        first, last = 0, num_tokens
        if around is not None:
            first = max(0, int(np.searchsorted(ends, around[0], side="right")) - 1)
            last = min(num_tokens, int(np.searchsorted(ends, around[1])))
        data, trained = self.row(row), self.encoded[row].trained != 0
        is_control = [data[ends[token] : ends[token] + 1] == MARK for token in range(first, last)]
        borders = np.flatnonzero(np.diff(np.array(is_control) * 2 + trained[first:last])) + 1 + first
        pieces = [_ellipsis(first)] if first else []
        for start, stop in itertools.pairwise([first, *borders.tolist(), last]):
            text = data[ends[start] : ends[stop]].replace(MARK, b"").decode("utf-8", "replace")
            pieces.append(Piece(text, bool(trained[start]), is_control[start - first]))
        return pieces + ([_ellipsis(num_tokens - last)] if last < num_tokens else [])


def _ellipsis(num_tokens: int) -> Piece:
    return Piece(f" [… {num_tokens:,} tokens …] ", False)
