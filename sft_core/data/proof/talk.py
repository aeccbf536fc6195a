"""A conversation as the mask proof reads it: the texts of each message, and the turns that are to be trained."""

from __future__ import annotations

import json
from collections.abc import Hashable
from typing import Any

from sft_core.data.proof.forms import Texts
from sft_core.data.rendering.policy import RowPolicy
from sft_core.data.sources.formats.canonical import Conversation, Message

_SHORT = 24  # characters: a shorter variable of a template may choose how it renders; a longer one is a text


class Talk:
    """A conversation: the texts of each message, and the turns that no row has trained yet."""

    def __init__(self, conversation: Conversation, policy: RowPolicy):
        self.conversation, self.messages = conversation, conversation.get("messages", [])
        self.is_trained_whole = "text" in conversation or policy.loss_scope == "all"
        self.to_train = [] if self.is_trained_whole else _to_train(self.messages, policy)
        self.waiting = list(self.to_train)
        self.texts = [_texts(message, policy) for message in self.messages]
        self._shapes = [_shape(*said) for said in zip(self.messages, self.texts, strict=True)]
        kwargs = sorted(conversation.get("kwargs", {}).items())
        self._variables = (*((key, _choice(value)) for key, value in kwargs), bool(conversation.get("tools")))

    def shape(self, last: int, index: int) -> Hashable:
        """All that decides the form of a turn but the texts. last: the trained turn before it in its row, or -1."""
        return self._variables, last < 0, *self._shapes[last + 1 : index + 1]

    def segment(self, last: int, index: int) -> Texts:
        """The texts after the message `last`, up to and with the message `index`."""
        history: list[str] = []
        roles: list[str] = []
        for message in range(last + 1, index):
            history += self.texts[message]
            roles += [self.messages[message]["role"]] * len(self.texts[message])
        return Texts(history, roles, self.texts[index] if index < len(self.texts) else [])


def _to_train(messages: list[Message], policy: RowPolicy) -> list[int]:
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if policy.loss_scope == "completion":
        turns = turns[-1:]
    return [index for index in turns if messages[index].get("train", True)]


def thinking(message: Message, policy: RowPolicy) -> str:
    """The thinking that a turn is trained with; empty for none."""
    return "" if policy.thinking == "drop" else message.get("reasoning_content", "")


def spoken(message: Message, policy: RowPolicy) -> list[str]:
    """Thinking and content of a message, in the parts that a template writes one after another."""
    content, thought = message["content"], thinking(message, policy)
    texts = [part["text"] for part in content] if isinstance(content, list) else [content]
    return [thought, *texts] if thought.strip() else texts


def _texts(message: Message, policy: RowPolicy) -> list[str]:
    """All texts of a message: thinking, content, and the names and arguments of its tool calls."""
    texts = spoken(message, policy)
    for call in message.get("tool_calls", ()):
        function = call["function"]
        texts += [function["name"], json.dumps(function["arguments"], ensure_ascii=False)]
    return texts


def _shape(message: Message, texts: list[str]) -> Hashable:
    # An empty text leaves no hole in a form: texts that are not empty must not fit such a form.
    are_blank = tuple([not text or text.isspace() for text in texts])
    return message["role"], "reasoning_content" in message, len(message.get("tool_calls", ())), are_blank


def _choice(value: Any) -> Hashable:
    """What a template can branch on: the value of a flag, number or mode; of a text or list only its type."""
    is_choice = (
        value is None or isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) < _SHORT)
    )
    return value if is_choice else type(value).__name__
