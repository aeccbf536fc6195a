"""Conversations as text with the character spans that are trained. Masks are born here and nowhere else.

An assistant turn is trained from the end of its generation prompt to its stop token: exactly what the model
writes when it is served. Both ends come out of rendering the conversation up to the turn, with and without it.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from sft_core.data.rejects import Rejected, Rejects
from sft_core.data.templates import ChatTemplate, TemplateError
from sft_core.data.tokenizer import control_pattern, control_tokens, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from sft_core.store import Build

RENDERED = pa.schema(
    [
        ("row_id", pa.string()),
        ("prompt_hash", pa.uint64()),
        ("answer", pa.string()),
        ("text", pa.string()),
        ("spans", pa.list_(pa.int32())),  # start, end, start, end, ... of what is trained, in characters
        ("literals", pa.list_(pa.int32())),  # likewise, of control tokens that somebody typed
    ]
)
# Noncharacters of Unicode, free for a program's own use; one marks control tokens that somebody typed.
_SENTINELS = "".join(map(chr, range(0xFDD0, 0xFDF0)))


@dataclasses.dataclass(frozen=True)
class RenderedRow:
    """One training row: its text, what of it is trained, and which control tokens in it are plain text."""

    text: str
    spans: list[tuple[int, int]]
    literals: list[tuple[int, int]]
    is_last: bool  # whether the conversation's last turn is trained in it


@dataclasses.dataclass(frozen=True)
class Renderer:
    """Renders conversations by one template for one vocabulary.

    loss_scope: assistant (every assistant turn), completion (the last one) or all (every token).
    """

    template: ChatTemplate
    control: re.Pattern[str]
    eos_token: str
    loss_scope: str

    def render(self, conversation: dict[str, Any]) -> list[RenderedRow]:
        """The training rows of a conversation; each trained turn is in exactly one of them.

        More than one only where the template rewrites history (drops old thinking): a turn is trained in a row
        that holds it as it is served. Raises Rejected, TemplateError.
        """
        sentinel = _unused(json.dumps(conversation, ensure_ascii=False))
        guarded = self._guard(conversation, sentinel)
        if "text" in guarded:
            if self.loss_scope != "all":
                raise Rejected("no_assistant_turn", "a raw-text row needs training.loss_scope: all")
            text = guarded["text"] + self.eos_token
            return [self._row(text, [(0, len(text))], sentinel, is_last=True)]
        if self.loss_scope == "all":
            text = self._text(guarded, len(guarded["messages"]))
            return [self._row(text, [(0, len(text))], sentinel, is_last=True)]
        return self._rows_by_turn(guarded, sentinel)

    def _rows_by_turn(self, guarded: dict[str, Any], sentinel: str) -> list[RenderedRow]:
        turns = [index for index, message in enumerate(guarded["messages"]) if message["role"] == "assistant"]
        if self.loss_scope == "completion":
            turns = turns[-1:]
        texts = {turn: self._text(guarded, turn + 1) for turn in turns}
        spans = {turn: self._span(guarded, turn, texts[turn]) for turn in turns}
        rows: list[RenderedRow] = []
        last = turns[-1]
        while turns:
            text = texts[turns[-1]]
            inside = [turn for turn in turns if text.startswith(texts[turn][: spans[turn][1]])]
            rows.append(self._row(text, [spans[turn] for turn in inside], sentinel, is_last=last in inside))
            turns = [turn for turn in turns if turn not in inside]
        return rows[::-1]

    def _text(self, guarded: dict[str, Any], num_messages: int, add_generation_prompt: bool = False) -> str:
        return self.template.render(
            guarded["messages"][:num_messages],
            tools=guarded.get("tools"),
            kwargs=guarded.get("kwargs", {}),
            add_generation_prompt=add_generation_prompt,
        )

    def _span(self, guarded: dict[str, Any], turn: int, text: str) -> tuple[int, int]:
        """Where the turn stands in the text of the conversation up to it."""
        prompt = self._text(guarded, turn, add_generation_prompt=True)
        if not text.startswith(prompt):
            raise Rejected(
                "generation_prompt_mismatch",
                f"messages[{turn}]: the served prompt is not a prefix of the rendered turn: "
                f"prompt ends {prompt[-60:]!r}, turn starts {text[max(0, len(prompt) - 60) :][:120]!r}",
            )
        stops = [match for match in self.control.finditer(text, len(prompt)) if not text[match.end() :].strip()]
        if not stops:
            raise Rejected(
                "no_stop_token",
                f"messages[{turn}]: the rendered turn ends without a stop token of the vocabulary; set "
                "model.eos_token to the one that the template writes, and add it with model.add_special_tokens",
            )
        if stops[0][0] != self.eos_token:
            raise ValueError(
                f"the template ends an assistant turn with {stops[0][0]!r} but the end token is {self.eos_token!r}: "
                f"a served model would not stop there; set model.eos_token: {stops[0][0]!r}"
            )
        reasoning = guarded["messages"][turn].get("reasoning_content", "").strip()
        if reasoning not in text[len(prompt) :]:
            raise Rejected(
                "template_drops_thinking",
                f"messages[{turn}]: the template leaves out the turn's reasoning_content; "
                "set chat_template.template: thinking, or train on data without thinking",
            )
        return len(prompt), stops[0].end()

    def _guard(self, value: Any, sentinel: str) -> Any:
        """A copy in which each control token in a string is broken by a sentinel after its first character."""
        if isinstance(value, str):
            return self.control.sub(lambda match: match[0][0] + sentinel + match[0][1:], value)
        if isinstance(value, list):
            return [self._guard(element, sentinel) for element in value]
        if isinstance(value, dict):
            return {self._guard(key, sentinel): self._guard(element, sentinel) for key, element in value.items()}
        return value

    def _row(self, guarded: str, spans: list[tuple[int, int]], sentinel: str, *, is_last: bool) -> RenderedRow:
        """The row without sentinels, its offsets moved to the clean text."""
        parts = guarded.split(sentinel)
        if len(parts) == 1:
            return RenderedRow(guarded, spans, [], is_last)
        text = "".join(parts)
        literals, position = [], 0
        for part in parts[:-1]:
            position += len(part)  # the sentinel's place: one character into the token
            found = self.control.match(text, position - 1)
            if found:
                literals.append(found.span())

        def moved(offset: int) -> int:
            return offset - guarded.count(sentinel, 0, offset)

        return RenderedRow(text, [(moved(start), moved(end)) for start, end in spans], literals, is_last)


def _unused(text: str) -> str:
    for sentinel in _SENTINELS:
        if sentinel not in text:
            return sentinel
    raise Rejected("reserved_characters", "the row holds every noncharacter from U+FDD0 to U+FDEF")


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
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return ChatTemplate(source, special, datetime.date.fromisoformat(date), kwargs)


def build_rendered(
    build: Build,
    *,
    tokenizer: dict[str, Any],
    template: dict[str, Any],
    loss_scope: str,
    max_rejected_share: float,
) -> dict[str, Any]:
    """Writes rendered.parquet and rejects.jsonl from conversations. Raises ValueError for a template that fails."""
    vocabulary = load_tokenizer(**tokenizer)
    renderer = Renderer(
        chat_template(vocabulary, **template),
        control_pattern(control_tokens(vocabulary)),
        str(vocabulary.eos_token),
        loss_scope,
    )
    source = pq.ParquetFile(build.inputs["conversations"] / "conversations.parquet")
    num_rows = num_literals = 0
    with (
        source,
        pq.ParquetWriter(build.out / "rendered.parquet", RENDERED, compression="zstd") as writer,
        Rejects(build.out / "rejects.jsonl") as rejects,
        tqdm(total=source.metadata.num_rows, unit=" rows", disable=None, desc="render") as progress,
    ):
        for batch in source.iter_batches(batch_size=2000):
            rows = []
            for row in batch.to_pylist():
                conversation = json.loads(row["conversation"])
                try:
                    rendered = renderer.render(conversation)
                except TemplateError as error:
                    rejects.add(row["where"], Rejected("template_error", str(error)))
                    continue
                except Rejected as fault:
                    rejects.add(row["where"], fault)
                    continue
                rows += [_record(row, conversation, one) for one in rendered]
            num_rows += len(rows)
            num_literals += sum(len(row["literals"]) // 2 for row in rows)
            writer.write_table(pa.Table.from_pylist(rows, schema=RENDERED))
            progress.update(batch.num_rows)
        num_conversations = source.metadata.num_rows
    rejects.check(num_rows=num_conversations, max_share=max_rejected_share, source="render")
    return {
        "conversations": num_conversations,
        "rows": num_rows,
        "control_tokens_kept_as_text": num_literals,
        "rejected": rejects.counts,
    }


def _record(row: dict[str, Any], conversation: dict[str, Any], rendered: RenderedRow) -> dict[str, Any]:
    return {
        "row_id": row["row_id"],
        "prompt_hash": row["prompt_hash"],
        "answer": conversation.get("answer") if rendered.is_last else None,
        "text": rendered.text,
        "spans": [offset for span in rendered.spans for offset in span],
        "literals": [offset for span in rendered.literals for offset in span],
    }
