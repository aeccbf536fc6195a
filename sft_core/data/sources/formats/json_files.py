"""Rows of a JSON file, plain or compressed: JSON lines, or one list. Memory does not grow with the file."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from sft_core.data.sources.rejects import Rejected

RawRow = tuple[str, Any]  # its place; its data, or the Rejected that says why it has none
_CHARS_A_READ = 2**20
_MAX_ELEMENT_CHARS = 2**26  # a broken list fails here, before all of it is in memory
_AFTER_NUMBER = tuple(",] \t\r\n")
_SPACE = re.compile(r"[ \t\r\n]*")


def read_json(path: Path, columns: list[str] | None) -> Iterator[RawRow]:
    """The rows of a file, in order. A faulty line gives a Rejected in its place.

    Raises ValueError for a broken list (nothing says where its next element begins), and for a compressed file that is
    cut off or damaged.
    """
    rows = _list_elements(path) if _is_list(path) else _lines(path)
    for where, row in rows:
        if columns is not None and isinstance(row, dict):
            row = {name: row[name] for name in columns if name in row}
        yield where, row


def _is_list(path: Path) -> bool:
    """Whether a .json file is one list. A .jsonl file is lines, whatever the first one holds."""
    if path.name.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl"):
        return False
    with _opened(path) as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _lines(path: Path) -> Iterator[RawRow]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path.name}:{number}"
            try:
                yield where, json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                yield where, Rejected("invalid_utf8", f"byte {error.start} of the line is not UTF-8")
            except ValueError as error:
                yield where, Rejected("invalid_json", str(error))


def _list_elements(path: Path) -> Iterator[RawRow]:
    decoder = json.JSONDecoder()
    with _opened(path) as file:
        text = _Window(io.TextIOWrapper(file, encoding="utf-8-sig"), path)
        text.take("[")
        number = 0
        while not text.take("]"):
            if number and not text.take(","):
                raise text.fault(f"after element {number - 1} comes {text.ahead()!r}; expected , or ]")
            yield f"{path.name}: element {number}", text.decode(decoder, number)
            number += 1
        if text.ahead():
            raise text.fault(f"after the list comes {text.ahead()!r}; a .json file is one list, or JSON lines")


class _Window:
    """The part of a file that is being parsed. Text behind the position is dropped."""

    def __init__(self, file: io.TextIOWrapper, path: Path):
        self._file, self._path = file, path
        self._text, self._at, self._ended = "", 0, False

    def fault(self, message: str) -> ValueError:
        return ValueError(f"{self._path}: {message}; mend the list, or write one row a line (.jsonl)")

    def ahead(self) -> str:
        """The next character that is not white space; an empty string at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._text) or not self._grow():
                return self._text[self._at : self._at + 1]

    def take(self, character: str) -> bool:
        is_next = self.ahead() == character
        self._at += is_next
        return is_next

    def decode(self, decoder: json.JSONDecoder, number: int) -> Any:
        self.ahead()
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._at)
            except ValueError as error:
                # The element is broken, or the window ends inside it: read on to know which.
                if len(self._text) - self._at > _MAX_ELEMENT_CHARS or not self._grow():
                    raise self.fault(f"element {number} is not valid JSON ({error})") from None
                continue
            # A number may go on after the window: 1 is also the start of 1.5.
            is_whole = not isinstance(value, (int, float)) or self._text[end : end + 1] in _AFTER_NUMBER
            if is_whole or not self._grow():
                self._at = end
                return value

    def _grow(self) -> bool:
        """Doubles the text that is held, so that a large element is parsed a few times only. False at the end."""
        try:
            more = "" if self._ended else self._file.read(max(_CHARS_A_READ, len(self._text) - self._at))
        except UnicodeDecodeError as error:
            raise self.fault(f"not UTF-8 ({error.reason})") from None
        self._ended = not more
        if more:
            self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A plain or compressed file's bytes. Raises ValueError for a compressed one that is cut off or damaged."""
    if path.suffix not in (".gz", ".zst"):
        with path.open("rb") as file:
            yield file
        return
    try:
        # Arrow's reader, not zstandard's: zstandard takes the end of a cut-off file for the end of the data.
        with gzip.open(path) if path.suffix == ".gz" else pa.input_stream(path, compression="zstd") as compressed:
            yield io.BufferedReader(compressed)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be decompressed to its end ({error}); copy it again") from error
