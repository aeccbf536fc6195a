"""Tool definitions and tool calls in the one form that servers hand to a chat template: OpenAI's.

A tool is {"type": "function", "function": {"name", "description", "parameters"}}, whatever style a row has it in: a
model that is served sees its tools so, and a template that shows them as they come would otherwise train on another
text. Key order is kept, since templates show it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from sft_core.data.sources.formats.columns import json_list
from sft_core.data.sources.rejects import Rejected

_SCHEMA_KEYS = ("input_schema", "inputSchema")  # Anthropic's and MCP's names for `parameters`
_FUNCTION_TYPES = (None, "function", "custom")  # custom: Anthropic's word for a tool of the caller's own


def tool_definitions(value: Any, name: str) -> list[dict[str, Any]]:
    """Tools in OpenAI's style, bare ({name, description, parameters}) or Anthropic's (input_schema), as OpenAI's.

    Raises Rejected (invalid_tools; unsupported_tool for one whose schema only its provider knows).
    """
    return [_definition(tool, f"{name}[{index}]") for index, tool in enumerate(json_list(value, name))]


def _definition(tool: Any, where: str) -> dict[str, Any]:
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
        return tool if "type" in tool else {"type": "function", **tool}
    if "parameters" in function and any(key in function for key in _SCHEMA_KEYS):
        raise Rejected("invalid_tools", f"{where} has parameters and an input_schema")
    left_out = ("type", "cache_control")  # the wrapper's, and a hint to a provider's cache
    renamed = {("parameters" if key in _SCHEMA_KEYS else key): of for key, of in function.items()}
    return {"type": "function", "function": {key: of for key, of in renamed.items() if key not in left_out}}


def tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form, their arguments parsed. Raises Rejected (invalid_tool_calls)."""
    return [_call(call, f"{where}[{index}]") for index, call in enumerate(json_list(calls, where))]


def _call(call: Any, where: str) -> dict[str, Any]:
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
    entry = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **entry} if call.get("id") else entry


def leaves(value: Any) -> Iterator[Any]:
    """The values inside of lists and objects."""
    if isinstance(value, dict):
        for element in value.values():
            yield from leaves(element)
    elif isinstance(value, list):
        for element in value:
            yield from leaves(element)
    else:
        yield value


def is_written(value: Any, text: str) -> bool:
    """Whether a value of a tool call stands in the text, as it is or as JSON or Python write it."""
    ways = {str(value), repr(value)[1:-1] if isinstance(value, str) else repr(value)}
    quoted = (json.dumps(value, ensure_ascii=ascii_only) for ascii_only in (True, False))
    ways.update(way[1:-1] if isinstance(value, str) else way for way in quoted)
    return any(way in text for way in ways)
