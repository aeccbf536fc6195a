"""Tool definitions and tool calls in the one form that servers hand to a chat template: OpenAI's.

A tool is {"type": "function", "function": {"name", "description", "parameters"}}, whatever the row's style: a served
model sees its tools in this form, so training must show them in it as well. Keys keep their order, which templates
show.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, cast

from sft_core.data.sources.formats.canonical import Function, Tool, ToolCall
from sft_core.data.sources.formats.columns import json_list
from sft_core.data.sources.rejects import Rejected

_SCHEMA_KEYS = ("input_schema", "inputSchema")  # Anthropic's and MCP's names for `parameters`
_FUNCTION_TYPES = (None, "function", "custom")  # custom: Anthropic's word for a tool of the caller's own


def tool_definitions(value: Any, name: str) -> list[Tool]:
    """Tools in OpenAI's style, bare ({name, description, parameters}) or Anthropic's (input_schema), as OpenAI's.

    Raises Rejected (invalid_tools; unsupported_tool for one whose schema only its provider knows).
    """
    return [_definition(tool, f"{name}[{index}]") for index, tool in enumerate(json_list(value, name))]


def _definition(tool: Any, where: str) -> Tool:
    if isinstance(tool, str):  # a column of JSON texts, one a tool
        try:
            tool = json.loads(tool)
        except ValueError:
            raise Rejected("invalid_tools", f"{where} is a string that is not JSON") from None
    wrapped = isinstance(tool, dict) and isinstance(tool.get("function"), dict)
    function = tool["function"] if wrapped else tool
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Rejected("invalid_tools", f"{where} is no object that names a function")
    if tool.get("type") not in _FUNCTION_TYPES:
        raise Rejected("unsupported_tool", f"{where}.type: found {tool['type']!r}; it has no schema that can be shown")
    if wrapped:
        return cast(Tool, tool if "type" in tool else {"type": "function", **tool})
    if "parameters" in function and any(key in function for key in _SCHEMA_KEYS):
        raise Rejected("invalid_tools", f"{where} has parameters and an input_schema")
    dropped = ("type", "cache_control")  # the wrapper has the type; the other is a hint to a provider's cache
    renamed = {("parameters" if key in _SCHEMA_KEYS else key): value for key, value in function.items()}
    kept = {key: value for key, value in renamed.items() if key not in dropped}
    return {"type": "function", "function": cast(Function, kept)}


def tool_calls(calls: Any, where: str) -> list[ToolCall]:
    """Tool calls in OpenAI's form, their arguments parsed. Raises Rejected (invalid_tool_calls)."""
    return [_call(call, f"{where}[{index}]") for index, call in enumerate(json_list(calls, where))]


def _call(call: Any, where: str) -> ToolCall:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Rejected("invalid_tool_calls", f"{where} names no function")
    arguments = function.get("arguments", function.get("parameters"))
    while isinstance(arguments, str):  # some data sets encode them twice
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            raise Rejected("invalid_tool_calls", f"{where}.arguments is not JSON") from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise Rejected("invalid_tool_calls", f"{where}.arguments is an object; found {type(arguments).__name__}")
    entry: ToolCall = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **entry} if call.get("id") else entry


def leaves(value: Any) -> Iterator[Any]:
    """The values inside lists and objects, at any depth."""
    if isinstance(value, dict):
        for element in value.values():
            yield from leaves(element)
    elif isinstance(value, list):
        for element in value:
            yield from leaves(element)
    else:
        yield value


def is_written(value: Any, text: str) -> bool:
    """Whether the text has a value of a tool call, as it is or as JSON or Python write it."""
    ways = {str(value), repr(value)[1:-1] if isinstance(value, str) else repr(value)}
    quoted = (json.dumps(value, ensure_ascii=ascii_only) for ascii_only in (True, False))
    ways.update(way[1:-1] if isinstance(value, str) else way for way in quoted)
    return any(way in text for way in ways)
