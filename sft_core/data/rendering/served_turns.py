"""An assistant turn as it is served, also where the template renders the turn in another way.

Most templates render a turn as its served prompt, the turn's text and a stop token. Three styles differ, and in each
the text that the model writes can still be derived: the prompt opens a think block that the rendered turn leaves out
(DeepSeek-R1; Nemotron's turns without thinking), the turn changes the history before it (gpt-oss drops the thinking of
the steps that led to an answer), or the header of the next turn ends the turn (GLM).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import cast

from sft_core.data.rendering.templates import REASONING_KEYS, PreparedConversation, ServedMessage, TemplateError
from sft_core.data.rendering.thinking import OPEN_AT_END, THINKING_KEY
from sft_core.data.sources.rejects import Rejected

_OPENING = re.compile(r"<think>\s*")
_CLOSING = "</think>"
PROBE = "\ufdef"  # a noncharacter, which no message has


def served_turn(prepared: PreparedConversation, index: int) -> tuple[str, str]:
    """The served prompt of a turn, and that prompt followed by the turn as the model writes it.

    Raises Rejected when the template does not determine them.
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
    """Whether the turn's text has the values of these keys of its message, whatever the values are."""
    message = prepared.messages[index]
    probe = cast(ServedMessage, {**message, **{key: PROBE for key in keys if key in message}})
    probed = _with(prepared, index, probe)
    return PROBE in served_turn(probed, index)[1]


def _closing_the_block(said: str, thinking: str) -> str:
    opening = _OPENING.match(said)
    said = said[opening.end() :] if opening else said
    if said.startswith(_CLOSING):
        return thinking + said
    return said if opening else f"{thinking}\n{_CLOSING}\n\n{said}"


def _after_dropped_thoughts(prepared: PreparedConversation, index: int, text: str) -> str | None:
    """The turn after the prompt of a history without thoughts, if the template renders it after that history anyway."""
    history = [_without_thoughts(message) for message in prepared.messages[:index]]
    plain = dataclasses.replace(prepared, messages=[*history, prepared.messages[index]])
    prompt = plain.text(index, add_generation_prompt=True)
    return text[len(prompt) :] if plain.text(index + 1) == text and text.startswith(prompt) else None


def _without_thoughts(message: ServedMessage) -> ServedMessage:
    kept = _without_reasoning(message)
    # Such a template takes the content beside a call for a thought, too.
    return {**kept, "content": ""} if "tool_calls" in message else kept


def _without_reasoning(message: ServedMessage) -> ServedMessage:
    return cast(ServedMessage, {key: value for key, value in message.items() if key not in REASONING_KEYS})


def next_header(prepared: PreparedConversation, index: int) -> str:
    """The text that the template writes between the turn and a turn of the user, or of the called tool, after it."""
    role = "tool" if "tool_calls" in prepared.messages[index] else "user"
    # Leave out the thinking: a template may drop it as soon as a user follows.
    plain = dataclasses.replace(prepared, messages=list(map(_without_reasoning, prepared.messages)))
    text = plain.text(index + 1)
    try:
        longer = _with(plain, index + 1, {"role": role, "content": PROBE}).text(index + 2)
    except TemplateError:  # the template refuses such a turn there
        return ""
    return longer[len(text) :] if longer.startswith(text) else ""


def _with(prepared: PreparedConversation, index: int, message: ServedMessage) -> PreparedConversation:
    """The messages before `index`, and `message` after them."""
    return dataclasses.replace(prepared, messages=[*prepared.messages[:index], message])
