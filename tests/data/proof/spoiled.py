"""True rows and ways to spoil them, for the tests of the mask proof."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sft_core.data.proof.mask import MaskProof, MaskProofFailed
from sft_core.data.rendering.spans import RenderedRow
from sft_core.data.tokenizer.encoded import EncodedRows, encode_rows
from sft_core.data.tokenizer.tokenizer import stop_tokens as all_stop_tokens
from tests.data.families import CHATML, TAGS, Chat, assistant, call, result, system, talk, tool, user, vocabulary
from tests.data.rows import columns

STOP, START = "<|im_end|>", "<|im_start|>"
THINKING = (Path(__file__).parents[3] / "configs" / "templates" / "thinking.jinja").read_text()
# As Qwen3's: the rendered turn always has a think block, of which only a prompt without thinking holds an empty one.
BLOCKS = """{%- for m in messages -%}{{- '<|im_start|>' ~ m.role ~ '\n' -}}
{%- if m.role == 'assistant' -%}{{- '<think>\n' ~ (m.reasoning_content or '') ~ '\n</think>\n\n' -}}{%- endif -%}
{{- m.content ~ '<|im_end|>\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}"""


@functools.cache
def chat(template: str = THINKING, **policy: str) -> Chat:
    """The project's own template, or another one, with one vocabulary for all."""
    return Chat(_vocabulary(), template).with_policy(**policy)


@functools.cache
def _vocabulary() -> PreTrainedTokenizerFast:
    return vocabulary((*CHATML, *TAGS), eos=STOP)


TURNS = talk(
    system("Be kind."),
    user("Hello there."),
    assistant("Hi, you."),
    user("And now?"),
    assistant("The answer is\n\n4.", "2+2\n\nis 4"),
    header=False,
)


TOOLS = talk(
    system("Call a tool."),
    user("1+2?"),
    assistant("I add.", tool_calls=[call(a=1, b="zwei")]),
    result("It is 3."),
    assistant("Three."),
    tools=[tool()],
    header=False,
)
THINKS = talk(user("Q1"), assistant("A1", "thought one"), user("Q2"), assistant("A2", "thought two"))


@dataclasses.dataclass
class Group:
    """Conversations with their rows, to be spoiled and proved."""

    chat: Chat
    conversations: list[dict[str, Any]]
    rows: list[RenderedRow]
    numbers: list[int]  # of the rows' conversations
    spoil: Callable[[EncodedRows], EncodedRows] = lambda encoded: encoded

    def table(self) -> dict[str, list[Any]]:
        return columns(*self.rows) | {"conversation": self.numbers}

    def prove(self) -> dict[str, int]:
        stops = all_stop_tokens(self.chat.vocabulary, list(self.chat.extra_stop_tokens))
        proof = MaskProof(self.chat.vocabulary, self.chat.renderer.template, stops, self.chat.policy)
        encoded = self.spoil(encode_rows(self.chat.encoder, self.table()))
        return proof.check(self.conversations, self.table(), encoded)


def group(chat: Chat, *conversations: dict[str, Any]) -> Group:
    rendered = [(row, number) for number, of in enumerate(conversations) for row in chat.rows(of)]
    return Group(chat, list(conversations), [row for row, _ in rendered], [number for _, number in rendered])


def alike(conversation: dict[str, Any], number: int) -> dict[str, Any]:
    """Another conversation of the same shape."""
    changed = ("content", "reasoning_content")
    messages = [
        {key: f"{value} {number}" if key in changed and value else value for key, value in message.items()}
        for message in conversation["messages"]
    ]
    return {**conversation, "messages": messages}


def fails(spoiled: Group, fault: str, row: int = -1) -> MaskProofFailed:
    """The proof fails with the fault, and shows the row as it is masked."""
    with pytest.raises(MaskProofFailed, match=fault) as failed:
        spoiled.prove()
    error = failed.value
    shown = spoiled.rows[row]
    assert f"conversation row {row % len(spoiled.rows)}: " in error.fault
    assert "".join(piece.text for piece in error.pieces) == shown.text
    encoded = spoiled.spoil(encode_rows(spoiled.chat.encoder, spoiled.table()))
    decode = spoiled.chat.vocabulary.decode
    found = encoded[row % len(encoded)]
    trained = decode(found.input_ids[found.trained == 1])
    assert "".join(piece.text for piece in error.pieces if piece.is_trained) == trained
    assert "".join(re.findall("⟦(.*?)⟧", str(error).partition("⟦ ⟧:")[2], re.DOTALL)) == trained
    return error


BEFORE = pytest.mark.parametrize("num_before", [0, 3], ids=["first", "form known"])


def spoiled(chat: Chat, conversation: dict[str, Any], num_before: int) -> Group:
    """True rows: the conversation's last, after others of its shape. An audit is of the very first alone."""
    made = group(chat, talk(user("first"), assistant("of all")), *(alike(conversation, n) for n in range(num_before)))
    made.prove()
    last = group(chat, *made.conversations, conversation)
    counts = last.prove()
    assert counts["rows"] == len(last.rows)
    return last


def moved(row: RenderedRow, span: int, start: int = 0, end: int = 0) -> RenderedRow:
    changed = list(row.spans)
    changed[span] = (changed[span][0] + start, changed[span][1] + end)
    return dataclasses.replace(row, spans=changed)


def without(row: RenderedRow, span: int) -> RenderedRow:
    return dataclasses.replace(row, spans=[of for number, of in enumerate(row.spans) if number != span])


def with_span(row: RenderedRow, text: str) -> RenderedRow:
    """Trains the text besides, where it stands first."""
    start = row.text.index(text)
    return dataclasses.replace(row, spans=sorted([*row.spans, (start, start + len(text))]))
