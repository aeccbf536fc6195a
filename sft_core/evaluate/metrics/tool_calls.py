"""The metric `tool_call`: the calls in a text, as JSON or Python between the tags that chat templates use."""

from __future__ import annotations

import ast
import json
import re
from typing import Any, TypedDict

from sft_core.data.sources.formats.tools import tool_calls
from sft_core.data.sources.rejects import Rejected
from sft_core.evaluate.metrics.metric import Asked, Metric, Question

_TAGGED = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)  # JSON: ours, Hermes', Qwen's
_CODE = re.compile(r"<code>(.*?)</code>", re.DOTALL)  # Python: ours, SmolLM3's


class Call(TypedDict):
    name: str
    arguments: dict[str, object]


def calls_in(text: str) -> list[str]:
    """Each call as canonical JSON of its name and arguments, sorted; an empty list for a text without calls.

    A turn makes all its calls before it gets a result, so their order means nothing. Raises ValueError for a call that
    cannot be read.
    """
    if "<tool_call>" in text:
        bodies = _TAGGED.findall(text)
        if text.count("<tool_call>") != len(bodies):
            raise ValueError("a <tool_call> does not end")
        return _canonical([_json(body) for body in bodies])
    return _canonical([call for block in _CODE.findall(text) for call in _python_calls(block)])


def calls_in_answer(answer: str) -> list[str]:
    """The calls of a row's answer, which may also be a JSON list of calls, or a single call. Raises ValueError."""
    if answer.lstrip().startswith(("[", "{")):
        value = _json(answer)
        return _canonical(value if isinstance(value, list) else [value])
    return calls_in(answer)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _python_calls(block: str) -> list[Call]:
    """The calls of a block of Python, each an expression with literals by keyword. Nothing is executed."""
    try:
        statements = ast.parse(block.strip()).body
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("it is not Python") from None
    calls = []
    for statement in statements:
        call = statement.value if isinstance(statement, ast.Expr) else None
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("a statement is no call with arguments by name")
        arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        calls.append(Call(name=ast.unparse(call.func), arguments=arguments))
    return calls


def _canonical(calls: list[Any]) -> list[str]:
    try:
        functions = [call["function"] for call in tool_calls(calls, "calls")]
        return sorted(json.dumps(_numbers(function), sort_keys=True) for function in functions)
    except (Rejected, TypeError) as error:
        raise ValueError(str(error)) from None


def _numbers(value: Any) -> Any:
    """The value with whole floats as integers: 1.0 and 1 are the same number in JSON."""
    if isinstance(value, dict):
        return {key: _numbers(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers(element) for element in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


class ToolCall(Metric):
    """The calls of the row's answer, or without one, of its last trained turn. Text around the calls does not count.

    A row whose last turn has no call is not asked.
    """

    name = "tool_call"
    is_share = True
    nothing_to_ask = "none has an answer, and no last turn calls a tool between <tool_call> or <code> tags"

    def ask(self, question: Question) -> Asked | None:
        if question.answer is not None:
            return Asked(question.answer, self.read(question.answer))
        wanted = calls_in(question.target)
        return Asked("\n".join(wanted), wanted) if wanted else None

    def read(self, answer: str) -> list[str]:
        try:
            calls = calls_in_answer(answer)
        except ValueError as error:
            raise ValueError(f"found {answer[:80]!r}; its tool calls cannot be read ({error})") from None
        if not calls:
            raise ValueError(
                f"found {answer[:80]!r}; tool_call wants calls: JSON, or as the model writes them, between <tool_call> "
                "tags or as Python between <code> tags"
            )
        return calls

    def score(self, output: str, wanted: list[str]) -> float:
        try:
            return float(calls_in(output) == wanted)
        except ValueError:
            return 0.0
