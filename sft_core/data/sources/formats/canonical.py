"""The canonical form of a row as types. conversations.py makes it; JSON stores it."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class TextPart(TypedDict):
    type: str  # text
    text: str


Text = str | list[TextPart]


class FunctionCall(TypedDict):
    name: str
    arguments: dict[str, Any]


class ToolCall(TypedDict):
    id: NotRequired[str]
    type: str  # function
    function: FunctionCall


class Function(TypedDict):
    name: str
    description: NotRequired[str]
    parameters: NotRequired[dict[str, Any]]  # a JSON schema


class Tool(TypedDict):
    type: str  # function
    function: Function


class Message(TypedDict):
    role: str
    content: Text
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    is_error: NotRequired[bool]
    train: NotRequired[bool]  # False: an assistant turn that is only read
    weight: NotRequired[float]  # what multiplies the loss of an assistant turn, where that is not 1


class Conversation(TypedDict, total=False):
    """Messages and what belongs to them, or `text` alone for a raw-text row."""

    messages: list[Message]
    tools: list[Tool]
    kwargs: dict[str, Any]  # of the chat template
    answer: str  # what the report split is scored by
    text: str
