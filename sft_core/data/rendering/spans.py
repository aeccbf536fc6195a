"""Conversations as text with the character spans that are trained. No other module makes masks.

An assistant turn is trained from the end of its generation prompt to its stop token: exactly what the model writes
when it is served. Rendering the conversation up to the turn, with and without it, gives both ends. Turns share a row
only where the tokens of the row before each turn are the prompt that a server gives for it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from sft_core.data.rendering.policy import RowPolicy
from sft_core.data.rendering.served_turns import is_shown, next_header, served_turn
from sft_core.data.rendering.templates import REASONING_KEYS, ChatTemplate, PreparedConversation
from sft_core.data.rendering.thinking import THINKING_KEY, apply_policy, forget, history_start, trained_from
from sft_core.data.sources.formats.canonical import Conversation, Message, Text
from sft_core.data.sources.formats.tools import is_written, leaves
from sft_core.data.sources.rejects import Rejected
from sft_core.data.tokenizer.tokenizer import any_of

# Noncharacters of Unicode, which programs may use inside. One of them marks control tokens that somebody typed.
_SENTINELS = "".join(map(chr, range(0xFDD0, 0xFDF0)))
_WINDOW = 256  # characters on either side of a border that decide on it
_SHORT = 16  # characters: the template itself may contain a text as short as this


@dataclasses.dataclass(frozen=True)
class RenderedRow:
    """One training row: its text, the spans that are trained, and the control tokens that are plain text.

    Offsets count characters. The text is tokenized in pieces, cut at the spans' ends and at `cuts`.
    """

    text: str
    spans: list[tuple[int, int]]
    literals: list[tuple[int, int]]  # control tokens that somebody typed
    is_last: bool  # whether the conversation's last turn is trained in it
    cuts: list[int] = dataclasses.field(default_factory=list)
    weights: list[float] = dataclasses.field(default_factory=list)  # of each span; empty: all are 1
    turns: list[int] = dataclasses.field(default_factory=list)  # the message of each span; empty: not by turns


@dataclasses.dataclass(frozen=True)
class _Turn:
    """A trained turn in the guarded text of the conversation up to it."""

    index: int  # of its message
    text: str
    start: int
    end: int
    prompt_end: int
    weight: float


@dataclasses.dataclass(frozen=True)
class Renderer:
    """Renders conversations by one template for one vocabulary.

    is_boundary(before, after): whether a server that tokenizes both texts as one has a border between tokens where
    they meet. None: turns share a row if their texts alone allow it.
    """

    template: ChatTemplate
    control_tokens: tuple[str, ...]
    stop_tokens: tuple[str, ...]
    policy: RowPolicy = RowPolicy()  # noqa: RUF009  (frozen)
    is_boundary: Callable[[str, str], bool] | None = None

    @functools.cached_property
    def control(self) -> re.Pattern[str]:
        return any_of(self.control_tokens)

    @functools.cached_property
    def _control_in_json(self) -> re.Pattern[str]:
        return any_of([json.dumps(token, ensure_ascii=False)[1:-1] for token in self.control_tokens])

    def render(self, conversation: Conversation, source: str | None = None) -> list[RenderedRow]:
        """The training rows of a conversation. Each trained turn is in exactly one row.

        There are several rows only where a turn's history differs from the text in which earlier turns are trained,
        as with a template that drops old thinking. source: the conversation as JSON, if the caller has it.
        Raises Rejected, TemplateError, and ValueError when the stop token is not one at which serving stops.
        """
        source = source if source is not None else json.dumps(conversation, ensure_ascii=False)
        sentinel, unguarded = _unused(source), None
        if self._control_in_json.search(source):
            conversation, unguarded = self._guard(conversation, sentinel), conversation
        if "text" in conversation:
            if self.policy.loss_scope != "all":
                raise Rejected("no_assistant_turn", "a raw-text row needs training.loss_scope: all")
            return [self._whole(conversation["text"] + self.stop_tokens[0], sentinel)]
        conversation = apply_policy(conversation, self.policy.thinking)
        if self.policy.loss_scope == "all":
            messages = conversation["messages"]
            if any("train" in message or "weight" in message for message in messages):
                raise Rejected("turns_chosen", "a row that chooses turns to train cannot train every token")
            return [self._whole(self._prepare(conversation, 0).text(len(messages)), sentinel)]
        turns = self._turns(conversation)
        if unguarded is not None:
            self._check_served(apply_policy(unguarded, self.policy.thinking), turns, sentinel)
        return self._rows(turns, sentinel)

    def _whole(self, text: str, sentinel: str) -> RenderedRow:
        return self._unguarded(RenderedRow(text, [(0, len(text))], [], is_last=True), sentinel)

    def _turns(self, conversation: Conversation) -> list[_Turn]:
        """The turns to be trained, in order. Raises Rejected when there are none."""
        messages = conversation["messages"]
        indices = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if self.policy.loss_scope == "completion":
            indices = indices[-1:]
        indices = [index for index in indices if messages[index].get("train", True)]
        if not indices:
            raise Rejected("no_trained_turn", "no assistant turn of the row is to be trained")
        prepare = functools.cache(functools.partial(self._prepare, conversation))
        starts = (history_start(messages, index, self.policy.thinking) for index in indices)
        turns = [self._turn(prepare(start), messages, index) for index, start in zip(indices, starts, strict=True)]
        _check_history(messages[: indices[-1]], turns[-1].text)
        return turns

    def _check_served(self, conversation: Conversation, turns: list[_Turn], sentinel: str) -> None:
        """Raises Rejected where the template acts on control tokens in a message: a served prompt would differ."""
        for turn in turns:
            forgotten = history_start(conversation["messages"], turn.index, self.policy.thinking)
            served = self._prepare(conversation, forgotten).text(turn.index, add_generation_prompt=True)
            if served != turn.text[: turn.prompt_end].replace(sentinel, ""):
                raise Rejected(
                    "typed_control_tokens",
                    f"messages[{turn.index}]: the template takes control tokens that somebody typed for its own, so "
                    "that the served prompt is not what was said; remove them from the row",
                )

    def _rows(self, turns: list[_Turn], sentinel: str) -> list[RenderedRow]:
        rows: list[RenderedRow] = []
        last = turns[-1]
        while turns:
            text = turns[-1].text
            inside = [turn for turn in turns if text.startswith(turn.text[: turn.end])]
            if self.is_boundary is not None:
                inside = [turn for turn in inside if turn is turns[-1] or self._stays_cut(text, turn, sentinel)]
            rows.append(self._join(text, inside, sentinel, is_last=last in inside))
            turns = [turn for turn in turns if turn not in inside]
        return rows[::-1]

    def _stays_cut(self, text: str, turn: _Turn, sentinel: str) -> bool:
        """Whether a server that tokenizes the turn as history has the borders of the turn as it was written."""
        assert self.is_boundary is not None
        for cut in {turn.start, turn.prompt_end}:
            before, after = text[max(0, cut - _WINDOW) : cut], text[cut : cut + _WINDOW]
            control = [match.end() for match in self.control.finditer(before)]
            following = self.control.search(after)
            before, after = before[control[-1] if control else 0 :], after[: following.start() if following else None]
            if before and after and not self.is_boundary(before.replace(sentinel, ""), after.replace(sentinel, "")):
                return False
        return True

    def _join(self, text: str, turns: list[_Turn], sentinel: str, *, is_last: bool) -> RenderedRow:
        weights = [turn.weight for turn in turns]
        cuts = sorted({turn.prompt_end for turn in turns if turn.prompt_end != turn.start})
        guarded = RenderedRow(
            text,
            [(turn.start, turn.end) for turn in turns],
            [],
            is_last,
            cuts,
            [] if all(weight == 1 for weight in weights) else weights,
            [turn.index for turn in turns],
        )
        return self._unguarded(guarded, sentinel)

    def _prepare(self, conversation: Conversation, forgotten: int) -> PreparedConversation:
        return self.template.prepare(
            forget(conversation["messages"], forgotten) if forgotten else conversation["messages"],
            tools=conversation.get("tools"),
            kwargs=conversation.get("kwargs", {}),
        )

    def _turn(self, prepared: PreparedConversation, messages: list[Message], index: int) -> _Turn:
        """The turn with its place in the text of the conversation up to it."""
        prompt, text = served_turn(prepared, index)
        text, stop, end = self._stopped(prepared, text, len(prompt), index)
        message = messages[index]
        start = trained_from(text, len(prompt), end, self.policy.empty_thinking)
        _check_turn(prepared, message, text[max(start, len(prompt)) : stop], index)
        return _Turn(index, text, start, end, len(prompt), message.get("weight", 1.0))

    def _stopped(self, prepared: PreparedConversation, text: str, prompt_end: int, index: int) -> tuple[str, int, int]:
        """The text up to the turn's stop token, and the start and end of that token, the first at the text's end."""
        closing, rest = [], len(text)
        for match in reversed(list(self.control.finditer(text, max(prompt_end, len(text) - _WINDOW)))):
            if text[match.end() : rest].strip():
                break
            closing.append(match)
            rest = match.start()
        stops = [match for match in closing if match[0] in self.stop_tokens]
        if stops:
            stop = stops[-1]
            if inner := [token for token in self.stop_tokens if text.find(token, prompt_end, stop.start()) >= 0]:
                raise ValueError(
                    f"the template writes {inner[0]!r} inside of an assistant turn, and serving would stop there; "
                    "take it out of model.stop_tokens, or set another model.eos_token"
                )
            # Text after the stop token, such as a final EOS, never appears in later turns, so cut it.
            return text if stop is closing[0] else text[: stop.end()], stop.start(), stop.end()
        header = next_header(prepared, index)
        following = self.control.search(header)
        if following and following[0] in self.stop_tokens and not header[: following.start()].strip():
            return text + header[: following.end()], len(text) + following.start(), len(text) + following.end()
        if not closing:
            raise Rejected(
                "no_stop_token",
                f"messages[{index}]: the rendered turn ends without a stop token of the vocabulary; set "
                "model.eos_token to the one that the template writes, and add it with model.add_special_tokens",
            )
        ending = closing[0][0]
        raise ValueError(
            f"the template ends an assistant turn with {ending!r} but serving stops at "
            f"{', '.join(map(repr, self.stop_tokens))}: a served model would not stop there; set model.eos_token: "
            f"{ending!r}, or add it to model.stop_tokens where turns end in several ways"
        )

    def _guard(self, value: Any, sentinel: str) -> Any:
        """A copy in which a sentinel follows the first character of each control token in a string."""
        if isinstance(value, str):
            return self.control.sub(lambda match: match[0][0] + sentinel + match[0][1:], value)
        if isinstance(value, list):
            return [self._guard(element, sentinel) for element in value]
        if isinstance(value, dict):
            return {self._guard(key, sentinel): self._guard(element, sentinel) for key, element in value.items()}
        return value

    def _unguarded(self, row: RenderedRow, sentinel: str) -> RenderedRow:
        """The row without sentinels: offsets count the clean text, and the guarded tokens become literals."""
        parts = row.text.split(sentinel)
        if len(parts) == 1:
            return row
        text = "".join(parts)
        literals, position = [], 0
        for part in parts[:-1]:
            position += len(part)  # the sentinel's place: one character into the token
            token = self.control.match(text, position - 1)
            if token:
                literals.append(token.span())

        def moved(offset: int) -> int:
            return offset - row.text.count(sentinel, 0, offset)

        spans = [(moved(start), moved(end)) for start, end in row.spans]
        return dataclasses.replace(
            row, text=text, spans=spans, literals=literals, cuts=[moved(cut) for cut in row.cuts]
        )


def _unused(text: str) -> str:
    for sentinel in _SENTINELS:
        if sentinel not in text:
            return sentinel
    raise Rejected("reserved_characters", "the row holds every noncharacter from U+FDD0 to U+FDEF")


def _check_turn(prepared: PreparedConversation, message: Message, said: str, index: int) -> None:
    """Raises Rejected when the served turn lacks a part of its message."""
    where, thinking = f"messages[{index}]", message.get(THINKING_KEY, "").strip()

    def is_said(part: str, others: Sequence[str], keys: Sequence[str]) -> bool:
        # A short text can be in the template by chance, and any text in another part of the turn.
        is_sure = len(part) > _SHORT and not any(part in other for other in others)
        is_all = not thinking and part == said.strip()
        return not part or (part in said and (is_sure or is_all or is_shown(prepared, index, keys)))

    if not is_said(thinking, _parts(message["content"]), REASONING_KEYS):
        raise Rejected(
            "template_drops_thinking",
            f"{where}: the template leaves out the turn's reasoning_content; set chat_template.template: thinking, "
            "chat_template.thinking: inline (or drop), or train on data without thinking",
        )
    for part in _parts(message["content"]):
        if not is_said(part, (thinking,), ("content",)):
            raise Rejected("template_changes_content", f"{where}: the rendered turn has no {part[:80]!r}")
    called = Counter(call["function"]["name"] for call in message.get("tool_calls", ()))
    for call in message.get("tool_calls", ()):
        is_written_often = said.count(call["function"]["name"]) >= called[call["function"]["name"]]
        if not is_written_often or not all(is_written(value, said) for value in leaves(call["function"])):
            raise Rejected("template_drops_tool_calls", f"{where}: the rendered turn does not say all of {call!r}")


def _check_history(messages: list[Message], text: str) -> None:
    """Raises Rejected when the template leaves out a turn of a user or a tool: no answer without its question."""
    for index, message in enumerate(messages):
        if message["role"] in ("user", "tool"):
            for part in _parts(message["content"]):
                if part not in text and (message["role"] == "user" or not is_written(part, text)):
                    raise Rejected("template_drops_turn", f"messages[{index}]: the rendering has no {part[:80]!r}")


def _parts(content: Text) -> list[str]:
    """The texts of a message, without the white space around them, which templates trim."""
    return [part["text"].strip() for part in content] if isinstance(content, list) else [content.strip()]
