"""Raw rows of local files: JSONL and JSON (also .gz, .zst) and Parquet, in the order in which files are listed."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_core.data.sources.formats.json_files import RawRow, read_json
from sft_core.data.sources.read import ROWS_A_BATCH, without_nulls
from sft_core.data.sources.source import Description, Resolver, Source
from sft_core.local_files import digest_files
from sft_core.parquet import open_parquet

if TYPE_CHECKING:
    from sft_core.recipe.datasets.kinds.files import FileDataset

# Every dataset once had these keys of a hub dataset: without them, the keys of stored outputs would change.
_IDENTITY = {"id": None, "config": None, "split": "train"}
_SHOWN = {**_IDENTITY, "revision": "main"}


@dataclasses.dataclass(frozen=True)
class FileSource(Source):
    """Local files. Names and contents are the pin; folders are no part of it."""

    dataset: FileDataset

    @property
    def title(self) -> str:
        return ", ".join(self.dataset.paths)

    def pin(self, resolver: Resolver) -> str:
        return digest_files(list_files(self.dataset.paths))

    def identity(self) -> Mapping[str, str | None]:
        return dict(_IDENTITY)

    def rows(self, pin: str, columns: list[str] | None) -> Iterator[RawRow]:
        files = list_files(self.dataset.paths)
        if (digest := digest_files(files)) != pin:
            raise ValueError(
                f"{self.dataset.paths[0]}: the files changed since this run began ({pin[:12]} then, {digest[:12]} "
                "now); start a new run"
            )
        return read_files(files, columns)

    def peek(self, max_bytes: int | None, columns: list[str] | None) -> Iterator[RawRow] | None:
        if not any(glob.glob(path) or Path(path).is_file() for path in map(os.path.expanduser, self.dataset.paths)):
            return None
        files = list_files(self.dataset.paths)
        if max_bytes is not None and sum(path.stat().st_size for path in files) > max_bytes:
            return None
        return read_files(files, columns)

    def describe(self, licences: Mapping[str, str]) -> Description:
        return Description(None, None, None, [Path(path).name for path in self.dataset.paths], None)

    def shown(self) -> dict[str, Any]:
        values = {**super().shown(), "path": [Path(path).name for path in self.dataset.paths]}
        return {"name": values["name"], **_SHOWN, **values}

    @classmethod
    def origin(cls, section: Mapping[str, Any], list_files: Callable[[], list[str]]) -> dict[str, Any] | None:
        if "id" not in section or section["id"] is not None:
            return None
        return {"files": list_files(), "sha256": section["pin"]}


SOURCE = FileSource


def list_files(paths: list[str] | tuple[str, ...]) -> list[Path]:
    """The files that paths and globs name, sorted within each. Raises FileNotFoundError for a path without files."""
    files: list[Path] = []
    for path in map(os.path.expanduser, paths):
        if Path(path).is_dir():
            raise ValueError(f"{path}: is a folder; name the files in it, as {Path(path) / '*.jsonl'}")
        names = [path] if Path(path).is_file() else sorted(glob.glob(path, recursive=True))
        matches = [Path(name) for name in names if Path(name).is_file()]
        if not matches:
            raise FileNotFoundError(f"{path}: no such file (looked in {Path.cwd()})")
        unknown = [file for file in matches if not _is_known(file)]
        if unknown:
            raise ValueError(f"{unknown[0]}: a source is .jsonl or .json (also .gz, .zst) or .parquet")
        files += matches
    return list(dict.fromkeys(files))  # two globs may name the same file: read it once


def read_files(files: list[Path], columns: list[str] | None) -> Iterator[RawRow]:
    """(place, row) of each row; the place is the file and its line or row number."""
    for path in files:
        if path.suffix == ".parquet":
            yield from _read_parquet(path, columns)
        else:
            yield from read_json(path, columns)


def _is_known(path: Path) -> bool:
    return path.name.removesuffix(".gz").removesuffix(".zst").endswith((".jsonl", ".json")) or path.suffix == ".parquet"


def _read_parquet(path: Path, columns: list[str] | None) -> Iterator[RawRow]:
    try:
        with open_parquet(path) as file:
            missing = [name for name in columns or () if name not in file.schema_arrow.names]
            if missing:
                raise ValueError(f"no column {missing[0]!r}; it has {', '.join(file.schema_arrow.names)}")
            start = 0
            for batch in file.iter_batches(batch_size=ROWS_A_BATCH, columns=columns, use_threads=False):
                for index, row in enumerate(batch.to_pylist()):
                    yield f"{path.name}: row {start + index}", without_nulls(row)
                start += batch.num_rows
    except (ValueError, OSError) as error:  # of Arrow: they name no file
        raise type(error)(f"{path}: {error}") from None
