"""What an assistant turn is when it is served, where the template renders it in another way.

A rendered turn begins with its served prompt and ends with a stop token. Three styles of template break that, and
what the model writes follows from them all the same: the prompt opens a think block that the rendered turn leaves out
(DeepSeek-R1; Nemotron's turns without thinking), the turn changes the history before it (gpt-oss drops the thinking of
the steps that led to an answer), or the header of the next turn is what ends it (GLM).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from sft_core.data.rendering.templates import REASONING_KEYS, PreparedConversation, TemplateError
from sft_core.data.rendering.thinking import OPEN_AT_END, THINKING_KEY
from sft_core.data.sources.rejects import Rejected

_OPENING = re.compile(r"<think>\s*")
_CLOSING = "</think>"
_PROBE = "\ufdef"  # a noncharacter: nobody says it


def served_turn(prepared: PreparedConversation, index: int) -> tuple[str, str]:
    """The served prompt of a turn, and the text that begins with it and holds the turn as the model writes it.

    Raises Rejected when that does not follow from the template.
    """
    prompt, text = prepared.text(index, add_generation_prompt=True), prepared.text(index + 1)
    if text.startswith(prompt):
        return prompt, text
    opened = OPEN_AT_END.search(prompt)
    said: str | None
    if opened and text.startswith(prompt[: opened.start()]):
        said = _closing_the_block(text[opened.start() :], prepared.messages[index].get(THINKING_KEY, ""))
    else:
        said = _after_dropped_thoughts(prepared, index, text)
    if said is None:
        raise Rejected(
            "generation_prompt_mismatch",
            f"messages[{index}]: the served prompt is not a prefix of the rendered turn: "
            f"prompt ends {prompt[-60:]!r}, turn starts {text[max(0, len(prompt) - 60) :][:120]!r}",
        )
    return prompt, prompt + said


def is_shown(prepared: PreparedConversation, index: int, keys: Iterable[str]) -> bool:
    """Whether the turn shows what its message has in these keys, whatever that is."""
    message = prepared.messages[index]
    probed = _with(prepared, index, {**message, **{key: _PROBE for key in keys if key in message}})
    return _PROBE in served_turn(probed, index)[1]


def _closing_the_block(said: str, thinking: str) -> str:
    own = _OPENING.match(said)
    said = said[own.end() :] if own else said
    if said.startswith(_CLOSING):
        return thinking + said
    return said if own else f"{thinking}\n{_CLOSING}\n\n{said}"


def _after_dropped_thoughts(prepared: PreparedConversation, index: int, text: str) -> str | None:
    """What follows the prompt of a history without thoughts, when the turn is rendered after that one in any case."""
    history = [_without_thoughts(message) for message in prepared.messages[:index]]
    plain = dataclasses.replace(prepared, messages=[*history, prepared.messages[index]])
    prompt = plain.text(index, add_generation_prompt=True)
    return text[len(prompt) :] if plain.text(index + 1) == text and text.startswith(prompt) else None


def _without_thoughts(message: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    # What is said at a call is taken for a thought, too.
    return {**kept, "content": ""} if "tool_calls" in message else kept


def next_header(prepared: PreparedConversation, index: int) -> str:
    """What the template writes after the turn when a user, or the tool that was called, follows it."""
    role = "tool" if "tool_calls" in prepared.messages[index] else "user"
    # Without thinking, which would be dropped as soon as a user follows.
    said = [
        {key: value for key, value in message.items() if key not in REASONING_KEYS} for message in prepared.messages
    ]
    plain = dataclasses.replace(prepared, messages=said)
    text = plain.text(index + 1)
    try:
        longer = _with(plain, index + 1, {"role": role, "content": _PROBE}).text(index + 2)
    except TemplateError:  # it refuses such a turn there
        return ""
    return longer[len(text) :] if longer.startswith(text) else ""


def _with(prepared: PreparedConversation, index: int, message: dict[str, Any]) -> PreparedConversation:
    """The messages before index, and one more."""
    return dataclasses.replace(prepared, messages=[*prepared.messages[:index], message])
