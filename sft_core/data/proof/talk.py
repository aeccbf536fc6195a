"""A conversation as the mask proof reads it: what each message says, and which turns are to be trained."""

from __future__ import annotations

import json
from collections.abc import Hashable
from typing import Any

from sft_core.data.proof.forms import Texts
from sft_core.data.rendering.policy import RowPolicy

_SHORT = 24  # characters of a template's variable that may choose how it renders; a longer one is a text


class Talk:
    """A conversation by its messages: what each of them says, and which turns no row has trained yet."""

    def __init__(self, conversation: dict[str, Any], policy: RowPolicy):
        self.conversation, self.messages = conversation, conversation.get("messages", [])
        self.is_trained_whole = "text" in conversation or policy.loss_scope == "all"
        self.to_train = [] if self.is_trained_whole else _to_train(self.messages, policy)
        self.waiting = list(self.to_train)
        self.texts = [_texts(message, policy) for message in self.messages]
        self._shapes = [_shape(*said) for said in zip(self.messages, self.texts, strict=True)]
        kwargs = sorted(conversation.get("kwargs", {}).items())
        self._variables = (*((key, _choice(value)) for key, value in kwargs), bool(conversation.get("tools")))

    def shape(self, last: int, index: int) -> Hashable:
        """What the form of a turn hangs on besides its texts; last: the trained turn before it in its row, or -1."""
        return self._variables, last < 0, *self._shapes[last + 1 : index + 1]

    def segment(self, last: int, index: int) -> Texts:
        """What is said after the turn before, up to this one's end."""
        history: list[str] = []
        roles: list[str] = []
        for message in range(last + 1, index):
            history += self.texts[message]
            roles += [self.messages[message]["role"]] * len(self.texts[message])
        return Texts(history, roles, self.texts[index] if index < len(self.texts) else [])


def _to_train(messages: list[dict[str, Any]], policy: RowPolicy) -> list[int]:
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if policy.loss_scope == "completion":
        turns = turns[-1:]
    return [index for index in turns if messages[index].get("train", True)]


def thinking(message: dict[str, Any], policy: RowPolicy) -> str:
    """What a turn thinks where it is trained; empty for none."""
    return "" if policy.thinking == "drop" else message.get("reasoning_content", "")


def spoken(message: dict[str, Any], policy: RowPolicy) -> list[str]:
    content, thought = message["content"], thinking(message, policy)
    texts = [part["text"] for part in content] if isinstance(content, list) else [content]
    return [thought, *texts] if thought.strip() else texts


def _texts(message: dict[str, Any], policy: RowPolicy) -> list[str]:
    """What a message says: thinking, content, and the names and arguments of its tool calls."""
    texts = spoken(message, policy)
    for call in message.get("tool_calls", ()):
        function = call["function"]
        texts += [function["name"], json.dumps(function["arguments"], ensure_ascii=False)]
    return texts


def _shape(message: dict[str, Any], texts: list[str]) -> Hashable:
    # A text that is empty leaves no hole in a form, so that the form must not be taken for one that has it.
    are_blank = tuple([not text or text.isspace() for text in texts])
    return message["role"], "reasoning_content" in message, len(message.get("tool_calls", ())), are_blank


def _choice(value: Any) -> Hashable:
    """What a template can branch on: a flag, a number, a mode; of a text or a list only that it is there."""
    is_choice = (
        value is None or isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) < _SHORT)
    )
    return value if is_choice else type(value).__name__
