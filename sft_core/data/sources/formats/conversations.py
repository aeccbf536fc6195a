"""Canonical conversations: every format that users have becomes one, or is refused with a reason.

A canonical row is plain JSON: {"messages": [...], "tools": [...], "kwargs": {...}, "answer": "..."}, or
{"text": "..."} for raw text. canonical.py has its keys; keys without a value are absent.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any, Final, TypedDict, cast

from sft_core.data.sources.formats.blocks import RawCall, read_content
from sft_core.data.sources.formats.canonical import Conversation, Message, ToolCall
from sft_core.data.sources.formats.columns import json_list
from sft_core.data.sources.formats.tools import tool_calls, tool_definitions
from sft_core.data.sources.formats.turn_training import training_choice
from sft_core.data.sources.rejects import Rejected

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
    "tool_response": "tool",
}
_CALL_ROLES = ("function_call", "tool_call")  # turns whose text is a tool call, or a list of them
_EMPTY_BLOCK: Final = "empty_block"  # marks a message until its whole conversation is read
_RESERVED_KWARGS = ("messages", "tools", "add_generation_prompt")  # a template gets these from the conversation
_THINKING = re.compile(r"\s*<think>(.*?)</think>\s*(.*)\Z", re.DOTALL)


class _MarkedMessage(Message, total=False):
    empty_block: bool  # whether the turn has an empty think block


def canonical(row: Any, *, format: str = "auto") -> Conversation:
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
    turns = enumerate(_READERS[format](row))
    messages = [message for index, turn in turns for message in _messages(turn, f"messages[{index}]")]
    if not messages:
        raise Rejected("no_messages", "the conversation has no messages")
    if not any(message["role"] == "assistant" for message in messages):
        raise Rejected("no_assistant_turn", "the conversation has no assistant turn to train on")
    if all(message.get("train") is False for message in messages if message["role"] == "assistant"):
        raise Rejected("no_trained_turn", "the row trains none of its assistant turns")
    conversation: Conversation = {"messages": cast("list[Message]", messages)}
    column = "tools" if row.get("tools") else "functions"  # the older name, beside function_call
    if tools := tool_definitions(row.get(column), column):
        conversation["tools"] = tools
    kwargs = _template_kwargs(row)
    num_empty = sum([message.pop(_EMPTY_BLOCK, False) for message in messages])
    if num_empty and not any("reasoning_content" in message for message in messages):
        # An empty think block says that the row does not think; without the kwarg the template asks for thinking.
        kwargs.setdefault("enable_thinking", False)
    if kwargs:
        conversation["kwargs"] = kwargs
    if (answer := row.get("answer")) is not None:
        conversation["answer"] = to_json(answer) if isinstance(answer, dict | list) else str(answer)
    return conversation


def to_json(value: Any) -> str:
    """Compact JSON. Keys keep their order, in which a template shows a tool's schema and a call's arguments."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def row_id(conversation: Conversation) -> str:
    """16 hex digits of a digest of the content: duplicates have the same id, whatever the order of their keys."""
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
    messages = _list(row.get("messages"), "messages")
    system_turn = next((turn for turn in messages if isinstance(turn, dict) and _role(turn) == "system"), None)
    if not (system := _system(row)) or (system_turn is not None and system_turn.get("content") == row["system"]):
        return messages
    if system_turn is not None:
        raise Rejected("two_systems", "the row has a `system` and another system message; leave one out (columns)")
    return [*system, *messages]


def _system(row: dict[str, Any]) -> list[Any]:
    """The system turn of a row that has its text beside the turns, as Anthropic's, ShareGPT's and Alpaca's do."""
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def _read_sharegpt(row: dict[str, Any]) -> list[Any]:
    turns = _list(row.get("conversations", row.get("messages")), "conversations")
    messages = _system(row)
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise Rejected("invalid_message", f"conversations[{index}] is not an object")
        role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if role in _CALL_ROLES:
            calls = json_list(content if str(content).lstrip().startswith("[") else f"[{content}]", role)
            messages.append({**turn, "role": "assistant", "content": "", "tool_calls": calls})
        else:
            messages.append({**turn, "role": role, "content": content})
    return messages


def _read_alpaca(row: dict[str, Any]) -> list[Any]:
    messages = _system(row)
    for index, pair in enumerate(json_list(row.get("history"), "history")):
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
    return [*map(_untrained_by_default, before), *after]


def _untrained_by_default(raw: Any) -> Any:
    """A turn of a prompt. An assistant turn there is trained only if it asks for that itself."""
    chooses = not isinstance(raw, dict) or any(raw.get(key) is not None for key in ("train", "training", "weight"))
    return raw if chooses or _role(raw) != "assistant" else {**raw, "train": False}


_READERS: dict[str, Callable[[dict[str, Any]], list[Any]]] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "prompt_completion": _read_prompt_completion,
}


def _role(raw: dict[str, Any]) -> str | None:
    return _ROLE_NAMES.get(str(raw.get("role")))


def _messages(raw: Any, where: str) -> list[_MarkedMessage]:
    """The messages of one turn. Tool results in a user's turn become messages of their own, before it."""
    if not isinstance(raw, dict):
        raise Rejected("invalid_message", f"{where} is not an object")
    role = _role(raw)
    if role is None:
        raise Rejected("unknown_role", f"{where}.role: found {raw.get('role')!r}; known: {', '.join(ROLES)}")
    if role == "user" and raw.get("content") is None:
        raise Rejected("invalid_content", f"{where} is a user turn without content")
    choice = training_choice(raw, role, where)
    if role == "assistant":
        return [{**_assistant(raw, where), **choice, **_labels(raw)}]
    content = read_content(raw.get("content"), role, where)
    message: _MarkedMessage = {"role": role, "content": content.text, **_labels(raw)}
    if role == "tool" and raw.get("is_error"):
        message["is_error"] = True
    results = cast("list[_MarkedMessage]", list(content.results))
    return [*results, *([message] if content.text or not content.results else [])]


class _Labels(TypedDict, total=False):
    name: str
    tool_call_id: str


def _labels(raw: dict[str, Any]) -> _Labels:
    return cast(_Labels, {key: raw[key] for key in ("name", "tool_call_id") if raw.get(key) is not None})


def _assistant(raw: dict[str, Any], where: str) -> _MarkedMessage:
    content = read_content(raw.get("content"), "assistant", where)
    text, thinking = content.text, content.thinking
    if (refusal := raw.get("refusal")) is not None:
        # A refusal is an answer as well: OpenAI's models have it in place of content.
        if not isinstance(refusal, str) or (refusal and text):
            raise Rejected("invalid_message", f"{where} has content and a refusal, or one that is no text")
        text = text or refusal
    beside = raw.get("reasoning_content") or raw.get("reasoning") or raw.get("thinking")
    if beside is not None and not isinstance(beside, str):
        raise Rejected("invalid_message", f"{where}.reasoning_content is not a string")
    if beside and thinking:
        raise Rejected("invalid_message", f"{where} has its thinking twice: in a block and beside the content")
    reasoning, is_empty = beside or thinking or "", thinking == ""
    # Repeat: an empty think block can stand before the block that holds the thinking.
    while not reasoning.strip() and isinstance(text, str) and (block := _THINKING.match(text)):
        reasoning, text, is_empty = block[1], block[2], True
    message: _MarkedMessage = {"role": "assistant", "content": text}
    if reasoning.strip():
        message["reasoning_content"] = reasoning.strip("\n")
    elif is_empty:
        message[_EMPTY_BLOCK] = True
    if calls := _calls(raw, content.calls, where):
        message["tool_calls"] = calls
    if not text and "tool_calls" not in message and "reasoning_content" not in message:
        raise Rejected("empty_assistant_turn", f"{where} says nothing")
    return message


def _calls(raw: dict[str, Any], blocks: tuple[RawCall, ...], where: str) -> list[ToolCall]:
    calls_by_key = {
        "tool_calls": raw.get("tool_calls"),
        "function_call": [raw["function_call"]] if raw.get("function_call") else None,  # the older form, of one
        "content": list(blocks),
    }
    parsed = [tool_calls(calls, f"{where}.{key}") for key, calls in calls_by_key.items() if calls]
    if len(parsed) > 1:
        raise Rejected("invalid_tool_calls", f"{where} has its tool calls in two places")
    return parsed[0] if parsed else []


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
    # Arrow gives each row all keys of the column: None stands for a key that the row lacks.
    return {key: value for key, value in (kwargs or {}).items() if value is not None}


def _list(value: Any, name: str) -> list[Any]:
    if isinstance(value, str):
        return json_list(value, name)
    if value is None:
        raise Rejected("no_messages", f"the row has no `{name}`")
    if not isinstance(value, list):
        raise Rejected("no_messages", f"`{name}` is a list of turns; found {type(value).__name__}")
    return value
