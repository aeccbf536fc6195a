"""Over-long rows split at turns: windows of a conversation's exchanges that fit, each rendered as it is served.

An exchange is a user's turn and all that follows it up to the next one. A window is the conversation's head (system
messages, tools) and as many whole exchanges as fit; each trained turn of the row is in one window, or is counted as
lost where its exchange alone is too long.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sft_core.data.proof.mask import MaskProof
from sft_core.data.rendering.build import RENDERED, add_row, chat_template, make_renderer
from sft_core.data.rendering.policy import RowPolicy
from sft_core.data.rendering.spans import RenderedRow, Renderer
from sft_core.data.rendering.templates import TemplateError
from sft_core.data.shards.parallel import Shard, build_shards, plan_shards, shard_folder, total
from sft_core.data.shards.token_shards import TOKENS, WINDOWS, read_index
from sft_core.data.sources.rejects import Rejected
from sft_core.data.tokenizer.encoded import encode_rows
from sft_core.data.tokenizer.tokenizer import PieceEncoder, load_tokenizer
from sft_core.data.tokenizer.tokenizer import stop_tokens as all_stop_tokens

if TYPE_CHECKING:
    from sft_core.store.stage import Build


def build_windows(
    build: Build,
    *,
    tokenizer: dict[str, Any],
    template: dict[str, Any],
    stop_tokens: list[str],
    policy: dict[str, str],
    max_length: int,
) -> dict[str, Any]:
    """Writes shards of tokens.arrow and windows.parquet. Raises MaskProofFailed as tokenizing does."""
    with pq.ParquetFile(build.inputs["conversations"] / "conversations.parquet") as file:
        shards = plan_shards(file.num_row_groups)
    work = functools.partial(
        _start, dict(build.inputs), tokenizer, template, stop_tokens, RowPolicy(**policy), max_length
    )
    return total(build_shards(build.out, shards, work, runtime=build.runtime, desc="split at turns"))


class _Splitter(NamedTuple):
    renderer: Renderer
    encoder: PieceEncoder
    proof: MaskProof
    max_length: int

    def rows_that_fit(self, window: dict[str, Any]) -> list[RenderedRow] | None:
        """The window's rows, or None when one of them is too long or the template refuses it."""
        try:
            rows = self.renderer.render(window)
        except (Rejected, TemplateError):
            return None
        columns: dict[str, list[Any]] = {name: [] for name in RENDERED.names}
        for row in rows:
            add_row(columns, {"row_id": "", "prompt_hash": 0}, 0, None, row)
        return rows if encode_rows(self.encoder, columns).lengths.max() <= self.max_length else None


def _start(
    inputs: dict[str, Path],
    tokenizer: dict[str, Any],
    template: dict[str, Any],
    stop_tokens: list[str],
    policy: RowPolicy,
    max_length: int,
) -> Any:
    vocabulary = load_tokenizer(**tokenizer)
    made = chat_template(vocabulary, **template)
    splitter = _Splitter(
        make_renderer(vocabulary, made, policy, stop_tokens),
        PieceEncoder(vocabulary),
        MaskProof(vocabulary, made, all_stop_tokens(vocabulary, stop_tokens), policy),
        max_length,
    )
    return functools.partial(_split_shard, inputs, splitter)


def _split_shard(inputs: dict[str, Path], splitter: _Splitter, shard: Shard, out: Path) -> dict[str, Any]:
    counts = dict.fromkeys(("rows", "windows", "tokens", "lost_turns"), 0)
    lengths = read_index(inputs["tokens"], ["num_tokens"], [shard.number])["num_tokens"].to_numpy()
    first_row = 0
    with (
        pq.ParquetFile(inputs["conversations"] / "conversations.parquet") as conversations,
        pq.ParquetFile(shard_folder(inputs["rendered"], shard) / "rendered.parquet") as rendered,
        pq.ParquetWriter(out / "windows.parquet", WINDOWS, compression="zstd") as index,
        pa.OSFile(str(out / "tokens.arrow"), "wb") as file,
        pa.ipc.new_file(file, TOKENS) as tokens,
    ):
        for number, group in enumerate(range(shard.first_group, shard.end_group)):
            rows = rendered.read_row_group(number, ["row_id", "conversation"], use_threads=False).to_pydict()
            here = lengths[first_row : first_row + len(rows["row_id"])]
            if (here > splitter.max_length).any():
                talks = conversations.read_row_group(group, ["conversation"], use_threads=False)["conversation"]
                made = _split_group(splitter, rows, here, talks.to_pylist(), counts)
                _write(made, first_row, splitter, tokens, index, counts)
            first_row += len(here)
    return counts


class _Made(NamedTuple):
    """A window's row: the row of the group that it is cut from, and the conversation that it stands for."""

    of_row: int
    row_id: str
    window: dict[str, Any]
    row: RenderedRow


def _split_group(
    splitter: _Splitter, rows: dict[str, list[Any]], lengths: np.ndarray, talks: list[str], counts: dict[str, int]
) -> list[_Made]:
    made: list[_Made] = []
    members: dict[int, list[int]] = {}
    for row, place in enumerate(rows["conversation"]):
        members.setdefault(place, []).append(row)
    for place, own_rows in members.items():
        too_long = [number for number, row in enumerate(own_rows) if lengths[row] > splitter.max_length]
        if not too_long:
            continue
        conversation = json.loads(talks[place])
        rendered = splitter.renderer.render(conversation)
        for number in too_long:
            turns = rendered[number].turns
            windows = split_at_turns(conversation, turns, splitter.rows_that_fit)
            counts["rows"] += 1
            counts["lost_turns"] += len(turns) - sum(len(row.turns) for _, rows_of in windows for row in rows_of)
            row_id = rows["row_id"][own_rows[number]]
            made += [_Made(own_rows[number], row_id, window, row) for window, rows_of in windows for row in rows_of]
    return made


def split_at_turns(
    conversation: dict[str, Any],
    turns: list[int],
    rows_that_fit: Callable[[dict[str, Any]], list[RenderedRow] | None],
) -> list[tuple[dict[str, Any], list[RenderedRow]]]:
    """Windows of the conversation that train `turns` (places of messages), each with its rows.

    rows_that_fit: a window's rows, or None when it is too long. Where an exchange alone is, as many of its turns as
    fit are kept: up to the end of one of them, for a turn cut in two would teach not to stop.
    """
    messages = conversation["messages"]
    starts = [index for index, message in enumerate(messages) if message["role"] == "user"] or [0]
    num_head = next((index for index, message in enumerate(messages) if message["role"] != "system"), 0)
    starts[0] = num_head  # what stands before the first user turn goes with its exchange
    ends = [*starts[1:], len(messages)]
    windows, exchange = [], 0
    while exchange < len(starts):
        best, best_end = None, exchange + 1
        for end in range(exchange + 1, len(starts) + 1):
            found = _try(conversation, num_head, starts[exchange], ends[end - 1], turns, rows_that_fit)
            if found is None:
                break
            best, best_end = found, end
        if best is None:
            stops = [turn + 1 for turn in turns if starts[exchange] <= turn < ends[exchange] - 1]
            tried = (_try(conversation, num_head, starts[exchange], stop, turns, rows_that_fit) for stop in stops[::-1])
            best = next((found for found in tried if found is not None), None)
        if best is not None and best[1]:
            windows.append(best)
        exchange = best_end
    return windows


def _try(
    conversation: dict[str, Any],
    num_head: int,
    start: int,
    end: int,
    turns: list[int],
    rows_that_fit: Callable[[dict[str, Any]], list[RenderedRow] | None],
) -> tuple[dict[str, Any], list[RenderedRow]] | None:
    """The window of messages start to end behind the head, and its rows (none when it trains nothing)."""
    messages = conversation["messages"]
    kept = [
        message if index in turns or message["role"] != "assistant" else {**message, "train": False}
        for index, message in enumerate(messages[start:end], start)
    ]
    window = {**conversation, "messages": [*messages[:num_head], *kept]}
    if not any(start <= turn < end for turn in turns):
        return window, []
    rows = rows_that_fit(window)
    return None if rows is None else (window, rows)


def _write(
    made: list[_Made],
    first_row: int,
    splitter: _Splitter,
    tokens: pa.RecordBatchFileWriter,
    index: pq.ParquetWriter,
    counts: dict[str, int],
) -> None:
    if not made:
        return
    columns: dict[str, list[Any]] = {name: [] for name in RENDERED.names}
    windows: list[dict[str, Any]] = []
    for one in made:
        if not windows or windows[-1] is not one.window:
            windows.append(one.window)
        add_row(columns, {"row_id": one.row_id, "prompt_hash": 0}, len(windows) - 1, None, one.row)
    encoded = encode_rows(splitter.encoder, columns)
    splitter.proof.check(windows, columns, encoded)
    tokens.write_batch(encoded.as_batch(pa.array(columns["weights"], TOKENS.field("weights").type)))
    index.write_table(
        pa.table([[first_row + one.of_row for one in made], encoded.lengths, encoded.num_trained], schema=WINDOWS)
    )
    counts["windows"] += len(made)
    counts["tokens"] += len(encoded.ids)
