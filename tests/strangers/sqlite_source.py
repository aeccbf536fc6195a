"""Raw rows of an SQLite database."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_core.data.sources.formats.json_files import RawRow
from sft_core.data.sources.source import Resolver, Source

if TYPE_CHECKING:
    from sft_core.recipe.datasets.kinds.sqlite import SqliteDataset


@dataclasses.dataclass(frozen=True)
class SqliteSource(Source):
    """The rows of a query. A digest of them is the pin: another table of the database changes nothing."""

    dataset: SqliteDataset

    @property
    def title(self) -> str:
        return Path(self.dataset.sqlite).name

    def pin(self, resolver: Resolver) -> str:
        return self._digest()

    def identity(self) -> dict[str, Any]:
        return {"query": self.dataset.query}

    def rows(self, pin: str, columns: list[str] | None) -> Iterator[RawRow]:
        if self._digest() != pin:
            raise ValueError(f"{self.title}: the rows changed since this run began; start a new run")
        return self._read(columns)

    def peek(self, max_bytes: int | None, columns: list[str] | None) -> Iterator[RawRow] | None:
        path = Path(self.dataset.sqlite)
        too_large = max_bytes is not None and path.stat().st_size > max_bytes
        return None if too_large else self._read(columns)

    def shown(self) -> dict[str, Any]:
        return {**super().shown(), "sqlite": self.title}

    @classmethod
    def origin(cls, section: Mapping[str, Any], list_files: Callable[[], list[str]]) -> dict[str, Any] | None:
        return {"query": section["query"], "sha256": section["pin"]} if "query" in section else None

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for _, row in self._read(None):
            digest.update(json.dumps(row, sort_keys=True).encode())
        return digest.hexdigest()

    def _read(self, columns: list[str] | None) -> Iterator[RawRow]:
        with closing(sqlite3.connect(f"file:{self.dataset.sqlite}?mode=ro", uri=True)) as database:
            database.row_factory = sqlite3.Row
            for number, row in enumerate(database.execute(self.dataset.query)):
                yield (
                    f"row {number}",
                    {key: value for key, value in dict(row).items() if columns is None or key in columns},
                )


SOURCE = SqliteSource
