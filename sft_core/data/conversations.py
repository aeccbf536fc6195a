"""Canonical conversations: every format that users have becomes one, or is refused with a reason.

A canonical row is plain JSON: {"messages": [...], "tools": [...], "kwargs": {...}, "answer": "..."} with the
optional parts left out, or {"text": "..."} for raw text. A message has role and content, and where they are
set reasoning_content, tool_calls, tool_call_id and name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

from sft_core.data.rejects import Rejected

ROLES = ("system", "user", "assistant", "tool")
_ROLE_NAMES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "function_call",
}
_EMPTY_BLOCK = "empty_block"  # set on a message while its conversation is read
_RESERVED_KWARGS = ("messages", "tools", "add_generation_prompt")  # what the conversation itself gives a template
_THINKING = re.compile(r"\s*<think>(.*?)</think>\s*(.*)\Z", re.DOTALL)


def canonical(row: Any, *, format: str = "auto") -> dict[str, Any]:
    """The canonical conversation of one raw row. Raises Rejected.

    format: messages, sharegpt, alpaca, prompt_completion, text, or auto (by the row's keys).
    """
    if not isinstance(row, dict):
        raise Rejected("not_an_object", f"a row is a JSON object; found {type(row).__name__}")
    if format == "auto":
        format = _detect(row)
    if format == "text":
        if not isinstance(row.get("text"), str) or not row["text"]:
            raise Rejected("no_text", "a raw-text row has a non-empty string in `text`")
        return {"text": row["text"]}
    messages = [_message(message, index) for index, message in enumerate(_READERS[format](row))]
    if not messages:
        raise Rejected("no_messages", "the conversation has no messages")
    if not any(message["role"] == "assistant" for message in messages):
        raise Rejected("no_assistant_turn", "the conversation has no assistant turn to train on")
    conversation: dict[str, Any] = {"messages": messages}
    if tools := _json_list(row.get("tools"), "tools"):
        conversation["tools"] = tools
    kwargs = _template_kwargs(row)
    num_empty = sum([message.pop(_EMPTY_BLOCK, False) for message in messages])
    if num_empty and not any("reasoning_content" in message for message in messages):
        # An empty inline block says that the row does not think; the template would ask it to.
        kwargs.setdefault("enable_thinking", False)
    if kwargs:
        conversation["kwargs"] = kwargs
    if (answer := row.get("answer")) is not None:
        conversation["answer"] = str(answer)
    return conversation


def to_json(conversation: dict[str, Any]) -> str:
    """Keys stay in their order: a template shows a tool's schema and a call's arguments in it."""
    return json.dumps(conversation, ensure_ascii=False, separators=(",", ":"))


def row_id(conversation: dict[str, Any]) -> str:
    """16 hex digits over the content, whatever the order of its keys: duplicates have the same."""
    text = json.dumps(conversation, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _detect(row: dict[str, Any]) -> str:
    for key, format in _KEYS.items():
        if row.get(key) is not None:
            return format
    raise Rejected("no_messages", f"none of {', '.join(_KEYS)} is among the row's keys ({', '.join(map(str, row))})")


_KEYS = {
    "messages": "messages",
    "conversations": "sharegpt",
    "instruction": "alpaca",
    "completion": "prompt_completion",
    "text": "text",
}


def _read_messages(row: dict[str, Any]) -> list[Any]:
    return _list(row.get("messages"), "messages")


def _read_sharegpt(row: dict[str, Any]) -> list[Any]:
    turns = _list(row.get("conversations", row.get("messages")), "conversations")
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise Rejected("invalid_message", f"conversations[{index}] is not an object")
        role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if role == "function_call":
            calls = _json_list(content if str(content).lstrip().startswith("[") else f"[{content}]", "function_call")
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        else:
            messages.append({**turn, "role": role, "content": content})
    return messages


def _read_alpaca(row: dict[str, Any]) -> list[Any]:
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for index, pair in enumerate(_json_list(row.get("history"), "history")):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise Rejected("invalid_message", f"history[{index}] is not a pair of instruction and output")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    parts = [part for part in (row.get("instruction"), row.get("input")) if part]
    if not parts or not all(isinstance(part, str) for part in parts):
        raise Rejected("no_prompt", "an Alpaca row has its prompt as text in `instruction` and `input`")
    if row.get("output") is None:
        raise Rejected("no_assistant_turn", "an Alpaca row has its answer in `output`")
    return [*messages, {"role": "user", "content": "\n\n".join(parts)}, {"role": "assistant", "content": row["output"]}]


def _read_prompt_completion(row: dict[str, Any]) -> list[Any]:
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is None:
        raise Rejected("no_prompt", "a row with a `completion` has its prompt in `prompt`")
    before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    after = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
    return [*before, *after]


_READERS: dict[str, Callable[[dict[str, Any]], list[Any]]] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "prompt_completion": _read_prompt_completion,
}


def _message(raw: Any, index: int) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(raw, dict):
        raise Rejected("invalid_message", f"{where} is not an object")
    role = _ROLE_NAMES.get(str(raw.get("role")))
    if role not in ROLES:
        raise Rejected("unknown_role", f"{where}.role: found {raw.get('role')!r}; known: {', '.join(ROLES)}")
    if role == "user" and raw.get("content") is None:
        raise Rejected("invalid_content", f"{where} is a user turn without content")
    message: dict[str, Any] = {"role": role, "content": _content(raw.get("content"), where)}
    reasoning = raw.get("reasoning_content") or raw.get("reasoning") or raw.get("thinking")
    if role == "assistant":
        if reasoning is not None and not isinstance(reasoning, str):
            raise Rejected("invalid_message", f"{where}.reasoning_content is not a string")
        if not reasoning and isinstance(message["content"], str) and (found := _THINKING.match(message["content"])):
            reasoning, message["content"] = found[1], found[2]
        if reasoning and reasoning.strip():
            message["reasoning_content"] = reasoning.strip("\n")
        elif reasoning is not None and isinstance(raw.get("content"), str) and _THINKING.match(raw["content"]):
            message[_EMPTY_BLOCK] = True
        if calls := _tool_calls(raw.get("tool_calls"), where):
            message["tool_calls"] = calls
        if not message["content"] and "tool_calls" not in message and "reasoning_content" not in message:
            raise Rejected("empty_assistant_turn", f"{where} says nothing")
    for key in ("name", "tool_call_id"):
        if raw.get(key) is not None:
            message[key] = raw[key]
    return message


def _content(content: Any, where: str) -> str | list[dict[str, str]]:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return [{"type": "text", "text": part["text"]} for part in content if part["text"]]
    raise Rejected("invalid_content", f"{where}.content is neither a string nor a list of text parts")


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls in the OpenAI form, their arguments parsed."""
    found = []
    for index, call in enumerate(_json_list(calls, f"{where}.tool_calls")):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Rejected("invalid_tool_calls", f"{where}.tool_calls[{index}] names no function")
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError:
                raise Rejected("invalid_tool_calls", f"{where}.tool_calls[{index}].arguments is not JSON") from None
        entry = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        found.append({"id": call["id"], **entry} if call.get("id") else entry)
    return found


def _template_kwargs(row: dict[str, Any]) -> dict[str, Any]:
    kwargs = row.get("chat_template_kwargs")
    if isinstance(kwargs, str):
        try:
            kwargs = json.loads(kwargs)
        except ValueError:
            raise Rejected("invalid_kwargs", "chat_template_kwargs is not JSON") from None
    if kwargs is not None and not isinstance(kwargs, dict):
        raise Rejected("invalid_kwargs", f"chat_template_kwargs is an object; found {type(kwargs).__name__}")
    for name in _RESERVED_KWARGS:
        if (kwargs or {}).get(name) is not None:
            raise Rejected("invalid_kwargs", f"chat_template_kwargs.{name} belongs to the conversation itself")
    # Arrow gives every row every key of the column: None means that this row did not set it.
    return {key: value for key, value in (kwargs or {}).items() if value is not None}


def _list(value: Any, name: str) -> list[Any]:
    if isinstance(value, str):
        return _json_list(value, name)
    if value is None:
        raise Rejected("no_messages", f"the row has no `{name}`")
    if not isinstance(value, list):
        raise Rejected("no_messages", f"`{name}` is a list of turns; found {type(value).__name__}")
    return value


def _json_list(value: Any, name: str) -> list[Any]:
    if not value:
        return []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise Rejected("invalid_json", f"`{name}` is a string that is not JSON") from None
    if not isinstance(value, list):
        raise Rejected("invalid_json", f"`{name}` is a list; found {type(value).__name__}")
    return value
