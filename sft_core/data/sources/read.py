"""Raw rows of any source as canonical conversations: each row is kept, or counted as rejected."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from sft_core.data.sources.conversation_counts import ConversationCounts
from sft_core.data.sources.formats.conversations import canonical, row_id, to_json
from sft_core.data.sources.rejects import Rejected, Rejects
from sft_core.data.sources.splits import prompt_hash

if TYPE_CHECKING:
    from sft_core.data.sources.source import Source
    from sft_core.store.stage import Build

ROWS_A_GROUP = 500  # of conversations.parquet: rendering and tokenizing share row groups out to processes
ROWS_A_BATCH = 100  # read at once from Parquet: a row can be a book, and a row group on the hub a thousand books
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
    source: Source,
    columns: list[str] | None,
    format: str,
    pin: str,
    limit: int | None,
    max_rejected_share: float,
    **identity: Any,
) -> dict[str, Any]:
    """Writes conversations.parquet and rejects.jsonl. Raises ValueError for an empty or too faulty source.

    identity: the keys of the source's kind. `source` has them as well.
    """
    rows, num_rows = source.rows(pin, columns), 0
    with (
        pq.ParquetWriter(build.out / "conversations.parquet", CONVERSATIONS, compression="zstd") as writer,
        Rejects(build.out / "rejects.jsonl") as rejects,
    ):
        group: list[tuple[str, str, int, str]] = []
        for where, raw in tqdm(itertools.islice(rows, limit), unit=" rows", disable=None, desc=source.title):
            num_rows += 1
            try:
                group.append((where, *accept(raw, format)))
            except Rejected as fault:
                rejects.add(where, fault)
            if len(group) == ROWS_A_GROUP:
                _write(writer, group)
        _write(writer, group)
    rejects.check(num_rows=num_rows, max_share=max_rejected_share, source=source.title)
    num_kept = num_rows - sum(rejects.counts.values())
    return ConversationCounts(rows=num_rows, conversations=num_kept, rejected=rejects.counts).to_json()


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


def without_nulls(value: Any) -> Any:
    """A row without its nulls: Arrow gives each object all keys of its column, with null for those that it lacks."""
    if isinstance(value, dict):
        return {key: without_nulls(element) for key, element in value.items() if element is not None}
    if isinstance(value, list):
        return [without_nulls(element) for element in value]
    return value


def _write(writer: pq.ParquetWriter, group: list[tuple[str, str, int, str]]) -> None:
    if group:
        writer.write_table(pa.table(list(map(list, zip(*group, strict=True))), schema=CONVERSATIONS))
        group.clear()
