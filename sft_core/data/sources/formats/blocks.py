"""Content that is a list of blocks, Anthropic's and OpenAI's: its text, thinking, tool calls and tool results.

Only text is trained: a block of anything else (an image, a document, withheld thinking) makes its row a reject.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict

from sft_core.data.sources.formats.canonical import Message, Text, TextPart
from sft_core.data.sources.rejects import Rejected

_TEXT_TYPES = (None, "text", "input_text", "output_text")
_RANKS = {"thinking": 0, "text": 1, "tool_use": 2}  # the order in which a template writes a turn


class RawCall(TypedDict):
    """A tool call as its block has it: no value is checked yet."""

    id: Any
    name: Any
    arguments: Any


class Content(NamedTuple):
    """The parts of a message's content. `thinking` is None without thinking blocks, "" where they are empty."""

    text: Text
    thinking: str | None = None
    calls: tuple[RawCall, ...] = ()
    results: tuple[Message, ...] = ()


def read_content(content: Any, role: str, where: str) -> Content:
    """The parts of a message's content.

    Raises Rejected: invalid_content (malformed, or a block that a turn of this role cannot hold),
    unsupported_content (not text), interleaved_blocks (an order that no template writes).
    """
    if content is None or isinstance(content, str):
        return Content(content or "")
    if not isinstance(content, list):
        raise Rejected("invalid_content", f"{where}.content is neither a string nor a list of text parts")
    texts: list[str] = []
    thinking: list[str] = []
    calls: list[RawCall] = []
    results: list[Message] = []
    last = 0
    for index, block in enumerate(content):
        place = f"{where}.content[{index}]"
        kind = _kind(block, role, place)
        if kind == "text":
            text = block["refusal"] if block.get("type") == "refusal" else block["text"]
            texts += [text] if text else []
        elif kind == "thinking":
            thinking.append(_thinking(block, place))
        elif kind == "tool_use":
            calls.append({"id": block.get("id"), "name": block.get("name"), "arguments": block.get("input")})
        else:
            results.append(_result(block, place))
        if kind in _RANKS and (kind != "text" or text):
            if _RANKS[kind] < last:
                raise Rejected("interleaved_blocks", f"{place}: {kind} after what is written after it in one turn")
            last = _RANKS[kind]
    joined = "\n\n".join(text for text in thinking if text) if thinking else None
    # A list of text parts alone stays a list, as the row has it. The text of a mixed list becomes a string where it is
    # one part.
    mixed = bool(thinking or calls or results)
    return Content(_text(texts) if mixed else _parts(texts), joined, tuple(calls), tuple(results))


def _kind(block: Any, role: str, place: str) -> str:
    """text, thinking, tool_use or tool_result."""
    if not isinstance(block, dict):
        raise Rejected("invalid_content", f"{place} is no object: content is a string or a list of text parts")
    kind = block.get("type")
    if kind in _TEXT_TYPES or kind == "refusal":
        key = "refusal" if kind == "refusal" else "text"
        if isinstance(block.get(key), str):
            return "text"
        if kind is not None:
            raise Rejected("invalid_content", f"{place} is a text part without text")
    writers = {"thinking": "assistant", "tool_use": "assistant", "tool_result": "user"}
    if kind not in writers:
        raise Rejected("unsupported_content", f"{place}.type: found {kind!r}; only text is trained on, in text parts")
    if role != writers[kind]:
        raise Rejected("invalid_content", f"{place}: a {kind} block in a {role} turn; it belongs to {writers[kind]}s")
    return str(kind)


def _thinking(block: dict[str, Any], place: str) -> str:
    thinking = block.get("thinking")
    if isinstance(thinking, list):  # Mistral's: text parts
        thinking = "".join(_strings(read_content(thinking, "tool", f"{place}.thinking").text))
    if not isinstance(thinking, str):
        raise Rejected("invalid_content", f"{place} is a thinking block without its text")
    if not thinking.strip() and block.get("signature"):
        raise Rejected("unsupported_content", f"{place}: the thinking is withheld, only its signature is there")
    return thinking.strip("\n")


def _result(block: dict[str, Any], place: str) -> Message:
    text = read_content(block.get("content"), "tool", place).text
    message: Message = {"role": "tool", "content": text if isinstance(text, str) else _text(_strings(text))}
    if block.get("tool_use_id") is not None:
        message["tool_call_id"] = block["tool_use_id"]
    if block.get("is_error"):
        message["is_error"] = True
    return message


def _strings(parts: Text) -> list[str]:
    return [part["text"] for part in parts if isinstance(part, dict)]


def _parts(texts: list[str]) -> list[TextPart]:
    return [{"type": "text", "text": text} for text in texts]


def _text(texts: list[str]) -> Text:
    return _parts(texts) if len(texts) > 1 else "".join(texts)
