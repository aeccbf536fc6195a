"""The thinking of turns: in the row that trains a turn, and in the history that later turns see.

Policies: keep (as the data has it); drop (no turn thinks); only_last (a turn is trained with its thinking, and its
history has no thinking from before the last user turn, as with a server that drops old thinking); inline (the content
of an answer begins with its thinking between tags, for templates that write no thinking).
"""

from __future__ import annotations

import re
from typing import Final, cast

from sft_core.data.sources.formats.canonical import Conversation, Message, TextPart
from sft_core.data.sources.rejects import Rejected

THINKING_KEY: Final = "reasoning_content"
_EMPTY_BLOCK = r"<think>\s*</think>\s*"
_EMPTY_AT_START = re.compile(r"\s*" + _EMPTY_BLOCK)
_EMPTY_AT_END = re.compile(_EMPTY_BLOCK + r"\Z")
_CLOSED_AT_START = re.compile(r"\s*</think>\s*")
OPEN_AT_END = re.compile(r"<think>\s*\Z")
_WINDOW = 256  # characters before a turn, in which a think block is searched


def apply_policy(conversation: Conversation, policy: str) -> Conversation:
    """The conversation: under `drop` without thinking, under `inline` with the thinking in the answers.

    Raises Rejected for a turn that only thinks, under `drop`.
    """
    messages = conversation["messages"]
    if policy not in ("drop", "inline") or not any(THINKING_KEY in message for message in messages):
        return conversation
    if policy == "inline":
        return {**conversation, "messages": [_inline(message) for message in messages]}
    for index, message in enumerate(messages):
        if THINKING_KEY in message and not message["content"] and "tool_calls" not in message:
            raise Rejected("empty_assistant_turn", f"messages[{index}] says nothing without its thinking")
    kwargs = {**conversation.get("kwargs", {}), "enable_thinking": False}  # otherwise the template asks for thinking
    return {**conversation, "messages": [_without(message) for message in messages], "kwargs": kwargs}


def history_start(messages: list[Message], turn: int, policy: str) -> int:
    """The number of first messages that lose their thinking when `turn` is served."""
    if policy != "only_last":
        return 0
    return max((index for index in range(turn) if messages[index]["role"] == "user"), default=0)


def forget(messages: list[Message], num_messages: int) -> list[Message]:
    """The messages, with the thinking removed from the first `num_messages`."""
    return [*map(_without, messages[:num_messages]), *messages[num_messages:]]


def trained_from(text: str, prompt_end: int, end: int, policy: str) -> int:
    """Where the trained part of a turn begins: at the end of its prompt, before or after an empty think block."""
    before = max(0, prompt_end - _WINDOW)
    if policy == "masked":
        is_open = OPEN_AT_END.search(text, before, prompt_end)
        block = (_CLOSED_AT_START if is_open else _EMPTY_AT_START).match(text, prompt_end, end)
        return block.end() if block else prompt_end
    if policy == "trained":
        block = _EMPTY_AT_END.search(text, before, prompt_end)
        return block.start() if block else prompt_end
    return prompt_end


def _inline(message: Message) -> Message:
    thought, content = message.get(THINKING_KEY, "").strip(), message["content"]
    if not thought:
        return _without(message)
    block = f"<think>\n{thought}\n</think>\n\n"
    if isinstance(content, list):
        part: TextPart = {"type": "text", "text": block}
        return {**_without(message), "content": [part, *content]}
    return {**_without(message), "content": block + content}


def _without(message: Message) -> Message:
    return cast(Message, {name: value for name, value in message.items() if name != THINKING_KEY})
