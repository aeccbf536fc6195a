"""Raw rows from local files or the hub, as canonical conversations: each row is kept or counted as rejected."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from sft_core.data.formats.conversations import canonical, row_id, to_json
from sft_core.data.formats.json_files import RawRow, read_json
from sft_core.data.hub_token import check_token
from sft_core.data.rejects import Rejected, Rejects
from sft_core.data.splits import prompt_hash

if TYPE_CHECKING:
    from sft_core.store import Build

ROWS_A_GROUP = 500  # rendering and tokenizing work on row groups, several at a time
ROWS_A_BATCH = 100  # read at once from Parquet: a row can be a book, and a row group of the hub's a thousand of them
CONVERSATIONS = pa.schema(
    [
        ("where", pa.string()),  # file and line, or the row's number
        ("row_id", pa.string()),
        ("prompt_hash", pa.uint64()),
        ("conversation", pa.string()),
    ]
)


def build_conversations(
    build: Build,
    *,
    paths: list[str],
    id: str | None,
    config: str | None,
    split: str,
    columns: list[str] | None,
    format: str,
    pin: str,
    limit: int | None,
    max_rejected_share: float,
) -> dict[str, Any]:
    """Writes conversations.parquet and rejects.jsonl. Raises ValueError for an empty or too faulty source."""
    if paths:
        files = list_files(paths)
        if (found := digest_files(files)) != pin:
            raise ValueError(
                f"{paths[0]}: the files changed since this run began ({pin[:12]} then, {found[:12]} now); "
                "start a new run"
            )
        rows = read_files(files, columns)
    else:
        rows = read_hub(str(id), config, split, pin, columns)
    source, num_rows = id or ", ".join(paths), 0
    with (
        pq.ParquetWriter(build.out / "conversations.parquet", CONVERSATIONS, compression="zstd") as writer,
        Rejects(build.out / "rejects.jsonl") as rejects,
    ):
        group: list[tuple[str, str, int, str]] = []
        for where, raw in tqdm(itertools.islice(rows, limit), unit=" rows", disable=None, desc=source):
            num_rows += 1
            try:
                group.append((where, *accept(raw, format)))
            except Rejected as fault:
                rejects.add(where, fault)
            if len(group) == ROWS_A_GROUP:
                _write(writer, group)
        _write(writer, group)
    rejects.check(num_rows=num_rows, max_share=max_rejected_share, source=source)
    return {"rows": num_rows, "conversations": num_rows - sum(rejects.counts.values()), "rejected": rejects.counts}


class Accepted(NamedTuple):
    row_id: str
    prompt_hash: int
    conversation: str


def accept(raw: Any, format: str) -> Accepted:
    """The canonical conversation of a raw row. Raises Rejected."""
    if isinstance(raw, Rejected):
        raise raw
    conversation = canonical(raw, format=format)
    text = to_json(conversation)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Rejected("invalid_unicode", "the row holds a lone surrogate, which is no character") from None
    return Accepted(row_id(conversation), prompt_hash(conversation), text)


def _write(writer: pq.ParquetWriter, group: list[tuple[str, str, int, str]]) -> None:
    if group:
        writer.write_table(pa.table(list(map(list, zip(*group, strict=True))), schema=CONVERSATIONS))
        group.clear()


def list_files(paths: list[str] | tuple[str, ...]) -> list[Path]:
    """The files that paths and globs name, sorted within each. Raises FileNotFoundError for one that names none."""
    files: list[Path] = []
    for path in map(os.path.expanduser, paths):
        names = [path] if Path(path).is_file() else sorted(glob.glob(path, recursive=True))
        found = [Path(name) for name in names if Path(name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path}: no such file (looked in {Path.cwd()})")
        unknown = [file for file in found if not _is_known(file)]
        if unknown:
            raise ValueError(f"{unknown[0]}: a source is .jsonl or .json (also .gz, .zst) or .parquet")
        files += found
    return list(dict.fromkeys(files))  # a file that two globs name is read once


def digest_files(files: list[Path]) -> str:
    """SHA-256 (hex) over names and contents: moving a folder changes nothing, renaming a file does."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest()


def read_files(files: list[Path], columns: list[str] | None) -> Iterator[RawRow]:
    for path in files:
        if path.suffix == ".parquet":
            yield from _read_parquet(path, columns)
        else:
            yield from read_json(path, columns)


def _is_known(path: Path) -> bool:
    return path.name.removesuffix(".gz").removesuffix(".zst").endswith((".jsonl", ".json")) or path.suffix == ".parquet"


def _read_parquet(path: Path, columns: list[str] | None) -> Iterator[RawRow]:
    with pq.ParquetFile(path) as file:
        missing = [name for name in columns or () if name not in file.schema_arrow.names]
        if missing:
            raise ValueError(f"{path}: no column {missing[0]!r}; it has {', '.join(file.schema_arrow.names)}")
        start = 0
        for batch in file.iter_batches(batch_size=ROWS_A_BATCH, columns=columns):
            for index, row in enumerate(batch.to_pylist()):
                yield f"{path.name}: row {start + index}", _without_nulls(row)
            start += batch.num_rows


def _without_nulls(value: Any) -> Any:
    """Arrow gives every object every key of its column; a null there says that the row did not have it."""
    if isinstance(value, dict):
        return {key: _without_nulls(element) for key, element in value.items() if element is not None}
    if isinstance(value, list):
        return [_without_nulls(element) for element in value]
    return value


def read_hub(id: str, config: str | None, split: str, commit: str, columns: list[str] | None) -> Iterator[RawRow]:
    """Rows of one split at a commit, streamed in their stored order; other splits are not touched.

    What is gated or private needs a token in the environment (HF_TOKEN). Raises ValueError for an unknown config,
    split or column and for a data set without access, ConnectionError when the hub cannot be reached.
    """
    import datasets

    # The defaults wait for minutes on a hub that is down; the client below retries by itself.
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
    check_token()
    try:
        builder = datasets.load_dataset_builder(id, config, revision=commit)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(f"{error} Where it is gated or private, ask for access and set HF_TOKEN.") from None
    if builder.hash != commit:
        # Out of reach, datasets falls back to whatever commit its cache holds, with only a warning.
        raise ConnectionError(f"{id}: asked for commit {commit}; the hub cannot be reached and the cache has another")
    files = builder.config.data_files or {}
    if split not in files:
        raise ValueError(f"{id} (config {builder.config.name}): no split {split!r}; it has {', '.join(sorted(files))}")
    # By its own files: asked for a split by name, datasets casts it to the features of the first split.
    is_parquet = builder.name == "parquet"
    options: dict[str, Any] = {"batch_size": ROWS_A_BATCH, "columns": columns or None} if is_parquet else {}
    try:
        rows = datasets.load_dataset(
            builder.name, data_files={split: list(files[split])}, split=split, streaming=True, **options
        )
        rows = rows.select_columns(columns) if columns and not is_parquet else rows
        for index, row in enumerate(rows):
            yield f"{id} {split}: row {index}", _without_nulls(row)
    except (pa.ArrowInvalid, ValueError) as error:
        raise ValueError(f"{id} (config {builder.config.name}, split {split}): {error}") from error
