"""Prompts as a server makes them, in the bytes of a row that is read back (see decoded.py).

Invariant: control tokens of the template have a mark, and typed control tokens have none.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final, NamedTuple

from sft_core.data.proof.decoded import Vocabulary
from sft_core.data.rendering.policy import RowPolicy
from sft_core.data.rendering.templates import ChatTemplate, PreparedConversation
from sft_core.data.sources.formats.canonical import Conversation

_THINKING: Final = "reasoning_content"
_NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
_BLOCK_BYTES = 256  # at a prompt's end, in which an empty think block is searched


class Served(NamedTuple):
    """A turn's prompt, and the rendering of the conversation up to the turn."""

    prompt: bytes
    rendering: bytes
    is_as_typed: (
        bool  # whether the prompt is the text that a server tokenizes: the conversation has no typed control token
    )


class Server:
    """Renders prompts by the recipe's template and policy of thinking."""

    def __init__(self, vocabulary: Vocabulary, template: ChatTemplate, policy: RowPolicy):
        self._vocabulary, self._template, self._policy = vocabulary, template, policy
        think, end = (re.escape(_text(vocabulary.marked(tag))) for tag in ("<think>", "</think>"))
        self._empty, self._closed = re.compile(rf"\s*{think}\s*{end}\s*"), re.compile(rf"\s*{end}\s*")
        self._empty_at_end, self._open_at_end = re.compile(rf"{think}\s*{end}\s*\Z"), re.compile(rf"{think}\s*\Z")

    def at_turn(self, conversation: Conversation, index: int, *, normalize: bool) -> Served:
        """Raises TemplateError when the template refuses the conversation."""
        safe, unused = self._without_control(conversation)
        prepared = self._prepared(safe, index)
        texts = prepared.text(index, add_generation_prompt=True), prepared.text(index + 1)
        prompt, rendering = (self._read(text, unused, normalize) for text in texts)
        return Served(prompt, rendering, safe == conversation)

    def whole(self, conversation: Conversation, *, normalize: bool) -> bytes:
        """The rendering of all messages. Raises TemplateError."""
        safe, unused = self._without_control(conversation)
        # Before a first turn nothing is forgotten.
        return self._read(self._prepared(safe, 0).text(len(safe["messages"])), unused, normalize)

    def trained_from(self, prompt: bytes, turn: bytes) -> int:
        """Where the trained part of prompt and turn begins: an empty think block is trained or masked by policy."""
        end = _text(prompt[-_BLOCK_BYTES:])
        if self._policy.empty_thinking == "trained":
            block = self._empty_at_end.search(end)
            return len(prompt) - (len(_bytes(block[0])) if block else 0)
        if self._policy.empty_thinking == "masked":
            block = (self._closed if self._open_at_end.search(end) else self._empty).match(_text(turn))
            return len(prompt) + (len(_bytes(block[0])) if block else 0)
        return len(prompt)

    def opens_thinking(self, prompt: bytes) -> bool:
        return bool(self._open_at_end.search(_text(prompt[-_BLOCK_BYTES:])))

    def _prepared(self, conversation: Conversation, turn: int) -> PreparedConversation:
        """The conversation without the thinking that the policy forgets: all of it, or that before the last user."""
        messages, kwargs = conversation["messages"], conversation.get("kwargs", {})
        users = [number for number in range(turn) if messages[number]["role"] == "user"]
        last_user = users[-1] if users else 0
        policy = self._policy.thinking
        forgotten = {"keep": 0, "drop": len(messages), "only_last": last_user, "inline": len(messages)}[policy]
        if policy == "drop" and any(_THINKING in message for message in messages):
            kwargs = {**kwargs, "enable_thinking": False}
        shown: list[dict[str, object]] = [
            {key: value for key, value in message.items() if key != _THINKING or number >= forgotten}
            for number, message in enumerate(messages)
        ]
        if policy == "inline":
            for message, said in zip(shown, messages, strict=True):
                if thought := said.get(_THINKING, "").strip():
                    block, content = f"<think>\n{thought}\n</think>\n\n", said["content"]
                    if isinstance(content, list):
                        message["content"] = [{"type": "text", "text": block}, *content]
                    else:
                        message["content"] = block + content
        return self._template.prepare(shown, tools=conversation.get("tools"), kwargs=kwargs)

    def _without_control(self, conversation: Conversation) -> tuple[Conversation, str]:
        """The conversation with an unused character inside each typed control token, and that character."""
        text = json.dumps(conversation, ensure_ascii=False)
        unused = next(character for character in _NONCHARACTERS if character not in text)

        def safe(value: Any) -> Any:
            if isinstance(value, str):
                return self._vocabulary.control.sub(lambda match: match[0][0] + unused + match[0][1:], value)
            if isinstance(value, dict):
                return {safe(key): safe(element) for key, element in value.items()}
            return [safe(element) for element in value] if isinstance(value, list) else value

        return safe(conversation), unused

    def _read(self, text: str, unused: str, normalize: bool) -> bytes:
        return self._vocabulary.marked(text, normalize=normalize).replace(unused.encode(), b"")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
