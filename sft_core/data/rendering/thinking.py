"""What becomes of a turn's thinking: in the row that trains it, and in the history that later turns see.

Policies: keep (as the data has it), drop (nobody thinks), only_last (a turn is trained with its thinking, but what
was thought before the last user turn is gone from its history, as a server that drops old thinking shows it), inline
(each answer begins with its thinking between tags, in its content: for templates that know no thinking of their own).
"""

from __future__ import annotations

import re
from typing import Any

from sft_core.data.sources.rejects import Rejected

THINKING_KEY = "reasoning_content"
_EMPTY_BLOCK = r"<think>\s*</think>\s*"
_EMPTY_AT_START = re.compile(r"\s*" + _EMPTY_BLOCK)
_EMPTY_AT_END = re.compile(_EMPTY_BLOCK + r"\Z")
_CLOSED_AT_START = re.compile(r"\s*</think>\s*")
OPEN_AT_END = re.compile(r"<think>\s*\Z")
_WINDOW = 256  # characters that are looked at before a turn


def apply_policy(conversation: dict[str, Any], policy: str) -> dict[str, Any]:
    """The conversation without thinking where the policy is `drop`, with it in the answers where that is `inline`.

    Raises Rejected for a turn that only thinks, where the policy is `drop`.
    """
    messages = conversation["messages"]
    if policy not in ("drop", "inline") or not any(THINKING_KEY in message for message in messages):
        return conversation
    if policy == "inline":
        return {**conversation, "messages": [_inline(message) for message in messages]}
    for index, message in enumerate(messages):
        if THINKING_KEY in message and not message["content"] and "tool_calls" not in message:
            raise Rejected("empty_assistant_turn", f"messages[{index}] says nothing without its thinking")
    kwargs = {**conversation.get("kwargs", {}), "enable_thinking": False}  # else the template asks for thinking
    return {**conversation, "messages": [_without(message) for message in messages], "kwargs": kwargs}


def history_start(messages: list[dict[str, Any]], turn: int, policy: str) -> int:
    """How many of the first messages lose their thinking when `turn` is served."""
    if policy != "only_last":
        return 0
    return max((index for index in range(turn) if messages[index]["role"] == "user"), default=0)


def forget(messages: list[dict[str, Any]], num_messages: int) -> list[dict[str, Any]]:
    """The messages, the first of them without their thinking."""
    return [*map(_without, messages[:num_messages]), *messages[num_messages:]]


def trained_from(text: str, prompt_end: int, end: int, policy: str) -> int:
    """Where the trained part of a turn begins: the end of its prompt, moved over an empty think block by policy."""
    before = max(0, prompt_end - _WINDOW)
    if policy == "masked":
        is_open = OPEN_AT_END.search(text, before, prompt_end)
        block = (_CLOSED_AT_START if is_open else _EMPTY_AT_START).match(text, prompt_end, end)
        return block.end() if block else prompt_end
    if policy == "trained":
        block = _EMPTY_AT_END.search(text, before, prompt_end)
        return block.start() if block else prompt_end
    return prompt_end


def _inline(message: dict[str, Any]) -> dict[str, Any]:
    thought, content = message.get(THINKING_KEY, "").strip(), message["content"]
    if not thought:
        return _without(message)
    block = f"<think>\n{thought}\n</think>\n\n"
    if isinstance(content, list):
        return {**_without(message), "content": [{"type": "text", "text": block}, *content]}
    return {**_without(message), "content": block + content}


def _without(message: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != THINKING_KEY}
