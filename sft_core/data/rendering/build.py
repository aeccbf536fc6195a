"""The render stage: a source's conversations as training rows of text, with the spans that are trained."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from sft_core.counts import Counts
from sft_core.data.rendering.policy import RowPolicy
from sft_core.data.rendering.spans import RenderedRow, Renderer
from sft_core.data.rendering.templates import ChatTemplate, TemplateError
from sft_core.data.shards.parallel import Shard, Tally, Work, build_shards, plan_shards, shard_folders, total
from sft_core.data.sources.rejects import Rejected, Rejects
from sft_core.data.tokenizer.tokenizer import (
    PieceEncoder,
    TokenizerArguments,
    control_tokens,
    load_tokenizer,
)
from sft_core.data.tokenizer.tokenizer import stop_tokens as all_stop_tokens
from sft_core.parquet import open_parquet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from sft_core.store.stage import Build

RENDERED = pa.schema(
    [
        ("row_id", pa.string()),
        ("prompt_hash", pa.uint64()),
        ("conversation", pa.int32()),  # its number in the input's row group of the same number
        ("answer", pa.string()),
        ("text", pa.string()),
        ("spans", pa.list_(pa.int32())),  # start, end, start, end, ... of the trained spans, in characters
        ("cuts", pa.list_(pa.int32())),  # further places at which the text is cut for tokenizing
        ("weights", pa.list_(pa.float32())),  # of each span; empty: all are 1
        ("literals", pa.list_(pa.int32())),  # start, end, ... of control tokens that somebody typed
    ]
)


class TemplateArguments(TypedDict):
    source: str | None  # None: the tokenizer's own template
    kwargs: dict[str, Any]
    date: str  # ISO


@dataclasses.dataclass(frozen=True, kw_only=True)
class RenderedCounts(Counts):
    conversations: int  # read, the rejected ones among them
    rows: int
    conversations_split: int = 0  # into several rows
    control_tokens_kept_as_text: int = 0
    rejected: dict[str, int]  # by reason


class Rendering(NamedTuple):
    """How a recipe turns conversations into text."""

    vocabulary: PreTrainedTokenizerFast
    template: ChatTemplate
    extra_stop_tokens: list[str]  # of the recipe
    policy: RowPolicy

    @classmethod
    def load(
        cls, tokenizer: TokenizerArguments, template: TemplateArguments, stop_tokens: list[str], policy: dict[str, str]
    ) -> Rendering:
        """Takes the arguments of a builder, in each process that works on shards: a tokenizer does not travel.

        Raises ValueError when there is no template.
        """
        vocabulary = load_tokenizer(**tokenizer)
        return cls(vocabulary, chat_template(vocabulary, **template), stop_tokens, RowPolicy(**policy))

    @property
    def stop_tokens(self) -> tuple[str, ...]:
        """The tokens that can end a turn: the tokenizer's and the recipe's."""
        return all_stop_tokens(self.vocabulary, self.extra_stop_tokens)

    def renderer(self) -> Renderer:
        """Raises ValueError for a tokenizer whose pieces do not add up."""
        return make_renderer(self.vocabulary, self.template, self.policy, self.extra_stop_tokens)


def make_renderer(
    vocabulary: PreTrainedTokenizerFast, template: ChatTemplate, policy: RowPolicy, extra_stop_tokens: list[str]
) -> Renderer:
    """The renderer of a recipe. Raises ValueError for a tokenizer whose pieces do not add up."""
    is_boundary = PieceEncoder(vocabulary).is_boundary
    return Renderer(
        template,
        tuple(control_tokens(vocabulary)),
        all_stop_tokens(vocabulary, extra_stop_tokens),
        policy,
        is_boundary=is_boundary if policy.served_prefix == "tokens" else None,
    )


def chat_template(
    tokenizer: PreTrainedTokenizerFast, *, source: str | None, kwargs: dict[str, Any], date: str
) -> ChatTemplate:
    """The template text `source`, or the tokenizer's own. Raises ValueError when there is none."""
    source = source or tokenizer.chat_template
    if not source:
        raise ValueError(
            f"chat_template.template: {tokenizer.name_or_path} has no chat template of its own; "
            "set chat_template.template to thinking or to a .jinja file"
        )
    if isinstance(source, dict):
        raise ValueError(
            f"chat_template.template: {tokenizer.name_or_path} has several templates ({', '.join(source)}); "
            "write the one to train with into a .jinja file and name it"
        )
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return ChatTemplate(source, special, datetime.date.fromisoformat(date), kwargs)


def build_rendered(
    build: Build,
    *,
    tokenizer: TokenizerArguments,
    template: TemplateArguments,
    stop_tokens: list[str],
    policy: dict[str, str],
    max_rejected_share: float,
) -> dict[str, Any]:
    """Writes shards of rendered.parquet, and rejects.jsonl. Raises ValueError for a template that fails."""
    source = build.inputs["conversations"] / "conversations.parquet"
    with open_parquet(source) as file:
        num_groups, num_conversations = file.num_row_groups, file.metadata.num_rows
    rendering = functools.partial(Rendering.load, tokenizer, template, stop_tokens, policy)
    work = functools.partial(_prepare_work, source, rendering)
    counts = total(build_shards(build.out, plan_shards(num_groups), work, runtime=build.runtime, desc="render"))
    rejects = Rejects.join(shard_folders(build.out), build.out / "rejects.jsonl")
    rejects.check(num_rows=num_conversations, max_share=max_rejected_share, source="render")
    of_all = {"conversations": num_conversations, "rejected": rejects.counts}
    return RenderedCounts.from_json({**counts, **of_all}).to_json()


def _prepare_work(source: Path, rendering: Callable[[], Rendering]) -> Work:
    return functools.partial(_render_shard, source, rendering().renderer())


def _render_shard(source: Path, renderer: Renderer, shard: Shard, out: Path) -> Tally:
    counts = {"rows": 0, "conversations_split": 0, "control_tokens_kept_as_text": 0}
    with (
        open_parquet(source) as file,
        pq.ParquetWriter(out / "rendered.parquet", RENDERED, compression="zstd") as writer,
        Rejects(out / "rejects.jsonl") as rejects,
    ):
        for group in range(shard.first_group, shard.end_group):
            columns: dict[str, list[Any]] = {name: [] for name in RENDERED.names}
            for number, row in enumerate(file.read_row_group(group, use_threads=False).to_pylist()):
                try:
                    conversation = json.loads(row["conversation"])
                    rendered = renderer.render(conversation, row["conversation"])
                except TemplateError as error:
                    rejects.add(row["where"], Rejected("template_error", str(error)))
                    continue
                except Rejected as fault:
                    rejects.add(row["where"], fault)
                    continue
                for rendered_row in rendered:
                    add_row(
                        columns, row["row_id"], row["prompt_hash"], number, conversation.get("answer"), rendered_row
                    )
                    counts["control_tokens_kept_as_text"] += len(rendered_row.literals)
                counts["rows"] += len(rendered)
                counts["conversations_split"] += len(rendered) > 1
            # Write a row group for each of the input's, even an empty one: both files are read side by side.
            writer.write_table(pa.table(columns, schema=RENDERED), row_group_size=max(1, len(columns["text"])))
    return counts


def add_row(
    columns: dict[str, list[Any]],
    row_id: str,
    prompt_hash: int,
    number: int,
    answer: str | None,
    rendered: RenderedRow,
) -> None:
    """Adds a rendered row to the columns of RENDERED. number: the conversation's in its row group."""
    values = (
        row_id,
        prompt_hash,
        number,
        answer if rendered.is_last else None,
        rendered.text,
        [offset for span in rendered.spans for offset in span],
        rendered.cuts,
        rendered.weights,
        [offset for span in rendered.literals for offset in span],
    )
    for column, value in zip(columns.values(), values, strict=True):
        column.append(value)
