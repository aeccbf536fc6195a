"""Over-long rows split at turns, into windows of a conversation that fit; each is rendered as it is served.

An exchange is a user's turn and the turns after it, up to the next user's turn. A window is the conversation's head
(system messages, tools) and as many whole exchanges as fit. Each trained turn of the row is in one window, or counts as
lost if its exchange alone is too long.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sft_core.counts import Counts
from sft_core.data.proof.mask import MaskProof
from sft_core.data.rendering.build import RENDERED, Rendering, TemplateArguments, add_row
from sft_core.data.rendering.spans import RenderedRow, Renderer
from sft_core.data.rendering.templates import TemplateError
from sft_core.data.shards.parallel import Shard, Tally, Work, build_shards, plan_shards, shard_folder, total
from sft_core.data.shards.token_shards import TOKENS, WINDOWS, read_index
from sft_core.data.sources.formats.canonical import Conversation, Message
from sft_core.data.sources.rejects import Rejected
from sft_core.data.tokenizer.encoded import encode_rows
from sft_core.data.tokenizer.tokenizer import PieceEncoder, TokenizerArguments
from sft_core.parquet import open_parquet

if TYPE_CHECKING:
    from sft_core.store.stage import Build


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowCounts(Counts):
    rows: int  # over-long
    windows: int
    tokens: int  # of the windows
    lost_turns: int  # trained turns of over-long rows that no window has


def build_windows(
    build: Build,
    *,
    tokenizer: TokenizerArguments,
    template: TemplateArguments,
    stop_tokens: list[str],
    policy: dict[str, str],
    max_length: int,
) -> dict[str, Any]:
    """Writes shards of tokens.arrow and windows.parquet. Raises MaskProofFailed as tokenizing does."""
    with open_parquet(build.inputs["conversations"] / "conversations.parquet") as file:
        shards = plan_shards(file.num_row_groups)
    rendering = functools.partial(Rendering.load, tokenizer, template, stop_tokens, policy)
    work = functools.partial(_prepare_work, dict(build.inputs), rendering, max_length)
    tallies = build_shards(build.out, shards, work, runtime=build.runtime, desc="split at turns")
    return WindowCounts(**total(tallies)).to_json()


class _Splitter(NamedTuple):
    renderer: Renderer
    encoder: PieceEncoder
    proof: MaskProof
    max_length: int

    def rows_that_fit(self, window: Conversation) -> list[RenderedRow] | None:
        """The window's rows, or None when one of them is too long or the template refuses it."""
        try:
            rows = self.renderer.render(window)
        except (Rejected, TemplateError):
            return None
        columns: dict[str, list[Any]] = {name: [] for name in RENDERED.names}
        for row in rows:
            add_row(columns, "", 0, 0, None, row)
        return rows if encode_rows(self.encoder, columns).lengths.max() <= self.max_length else None


def _prepare_work(inputs: dict[str, Path], rendering: Callable[[], Rendering], max_length: int) -> Work:
    loaded = rendering()
    splitter = _Splitter(
        loaded.renderer(),
        PieceEncoder(loaded.vocabulary),
        MaskProof(loaded.vocabulary, loaded.template, loaded.stop_tokens, loaded.policy),
        max_length,
    )
    return functools.partial(_split_shard, inputs, splitter)


def _split_shard(inputs: dict[str, Path], splitter: _Splitter, shard: Shard, out: Path) -> Tally:
    counts = dict.fromkeys(("rows", "windows", "tokens", "lost_turns"), 0)
    lengths = read_index(inputs["tokens"], ["num_tokens"], [shard.number])["num_tokens"].to_numpy()
    first_row = 0
    with (
        open_parquet(inputs["conversations"] / "conversations.parquet") as conversations,
        open_parquet(shard_folder(inputs["rendered"], shard) / "rendered.parquet") as rendered,
        pq.ParquetWriter(out / "windows.parquet", WINDOWS, compression="zstd") as index,
        pa.OSFile(str(out / "tokens.arrow"), "wb") as file,
        pa.ipc.new_file(file, TOKENS) as tokens,
    ):
        for number, group in enumerate(range(shard.first_group, shard.end_group)):
            rows = rendered.read_row_group(number, ["row_id", "conversation"], use_threads=False).to_pydict()
            here = lengths[first_row : first_row + len(rows["row_id"])]
            if (here > splitter.max_length).any():
                talks = conversations.read_row_group(group, ["conversation"], use_threads=False)["conversation"]
                window_rows = _split_group(splitter, rows, here, talks.to_pylist(), counts)
                _write(window_rows, first_row, splitter, tokens, index, counts)
            first_row += len(here)
    return counts


class _WindowRow(NamedTuple):
    """A row of a window, and the row of the group that the window is cut from."""

    of_row: int
    row_id: str
    window: Conversation
    row: RenderedRow


def _split_group(
    splitter: _Splitter, rows: dict[str, list[Any]], lengths: np.ndarray, talks: list[str], counts: dict[str, int]
) -> list[_WindowRow]:
    window_rows: list[_WindowRow] = []
    members: dict[int, list[int]] = {}
    for row, place in enumerate(rows["conversation"]):
        members.setdefault(place, []).append(row)
    for place, member_rows in members.items():
        too_long = [number for number, row in enumerate(member_rows) if lengths[row] > splitter.max_length]
        if not too_long:
            continue
        conversation = json.loads(talks[place])
        rendered = splitter.renderer.render(conversation)
        for number in too_long:
            turns = rendered[number].turns
            windows = split_at_turns(conversation, turns, splitter.rows_that_fit)
            counts["rows"] += 1
            counts["lost_turns"] += len(turns) - sum(len(row.turns) for _, rows_of in windows for row in rows_of)
            of_row = member_rows[number]
            row_id = rows["row_id"][of_row]
            window_rows += [_WindowRow(of_row, row_id, window, row) for window, rows_of in windows for row in rows_of]
    return window_rows


def split_at_turns(
    conversation: Conversation,
    turns: list[int],
    rows_that_fit: Callable[[Conversation], list[RenderedRow] | None],
) -> list[tuple[Conversation, list[RenderedRow]]]:
    """Windows of the conversation that train `turns` (numbers of messages), each with its rows.

    rows_that_fit: gives a window's rows, or None when the window is too long. An exchange that alone is too long keeps
    as many turns as fit. It ends with a whole turn, since a turn cut in two would teach not to stop.
    """
    messages = conversation["messages"]
    starts = [index for index, message in enumerate(messages) if message["role"] == "user"] or [0]
    num_head = next((index for index, message in enumerate(messages) if message["role"] != "system"), 0)
    starts[0] = num_head  # turns before the first user turn belong to the first exchange
    ends = [*starts[1:], len(messages)]
    windows, exchange = [], 0
    while exchange < len(starts):
        best, best_end = None, exchange + 1
        for end in range(exchange + 1, len(starts) + 1):
            window = _try(conversation, num_head, starts[exchange], ends[end - 1], turns, rows_that_fit)
            if window is None:
                break
            best, best_end = window, end
        if best is None:
            stops = [turn + 1 for turn in turns if starts[exchange] <= turn < ends[exchange] - 1]
            tried = (_try(conversation, num_head, starts[exchange], stop, turns, rows_that_fit) for stop in stops[::-1])
            best = next((window for window in tried if window is not None), None)
        if best is not None and best[1]:
            windows.append(best)
        exchange = best_end
    return windows


def _try(
    conversation: Conversation,
    num_head: int,
    start: int,
    end: int,
    turns: list[int],
    rows_that_fit: Callable[[Conversation], list[RenderedRow] | None],
) -> tuple[Conversation, list[RenderedRow]] | None:
    """The window of the head and the messages start to end, and its rows (none when it trains nothing).

    None when the window is too long.
    """
    messages = conversation["messages"]
    kept: list[Message] = [
        message if index in turns or message["role"] != "assistant" else {**message, "train": False}
        for index, message in enumerate(messages[start:end], start)
    ]
    window: Conversation = {**conversation, "messages": [*messages[:num_head], *kept]}
    if not any(start <= turn < end for turn in turns):
        return window, []
    rows = rows_that_fit(window)
    return None if rows is None else (window, rows)


def _write(
    window_rows: list[_WindowRow],
    first_row: int,
    splitter: _Splitter,
    tokens: pa.RecordBatchFileWriter,
    index: pq.ParquetWriter,
    counts: dict[str, int],
) -> None:
    if not window_rows:
        return
    columns: dict[str, list[Any]] = {name: [] for name in RENDERED.names}
    windows: list[Conversation] = []
    for window_row in window_rows:
        if not windows or windows[-1] is not window_row.window:
            windows.append(window_row.window)
        add_row(columns, window_row.row_id, 0, len(windows) - 1, None, window_row.row)
    encoded = encode_rows(splitter.encoder, columns)
    splitter.proof.check(windows, columns, encoded)
    tokens.write_batch(encoded.as_batch(pa.array(columns["weights"], TOKENS.field("weights").type)))
    of_row = [first_row + window_row.of_row for window_row in window_rows]
    index.write_table(pa.table([of_row, encoded.lengths, encoded.num_trained], schema=WINDOWS))
    counts["windows"] += len(window_rows)
    counts["tokens"] += len(encoded.ids)
