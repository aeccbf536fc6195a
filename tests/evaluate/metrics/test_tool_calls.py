"""Tool calls are equal by name and arguments as JSON, in the forms that our template has models write."""

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_core.evaluate.metrics.metric import Question
from sft_core.evaluate.metrics.tool_calls import ToolCall, calls_in, calls_in_answer

STOCK = {"name": "get_stock", "arguments": {"item": "pen", "colours": ["red", "blue"], "most": 3}}
PRICE = {"name": "get_price", "arguments": {"item": "pen"}}


def tagged(*calls: dict[str, Any]) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)


def score(output: str, answer: str) -> float:
    metric = ToolCall()
    asked = metric.ask(Question("0", answer, ""))
    assert asked is not None
    return metric.score(output, asked.wanted)


@pytest.mark.parametrize(
    ("output", "right"),
    [
        (tagged(STOCK), True),
        (f"Let me look.\n{tagged(STOCK)}", True),
        (tagged({"arguments": {"most": 3.0, "colours": ["red", "blue"], "item": "pen"}, "name": "get_stock"}), True),
        ('<code>\nget_stock(most=3, item="pen", colours=["red", "blue"])\n</code>', True),
        (tagged({**STOCK, "name": "get_stocks"}), False),
        (tagged({**STOCK, "arguments": {**STOCK["arguments"], "most": True}}), False),
        (tagged({**STOCK, "arguments": {**STOCK["arguments"], "colours": ["blue", "red"]}}), False),
        (tagged({**STOCK, "arguments": {"item": "pen"}}), False),
        (tagged(STOCK, STOCK), False),
        (tagged(STOCK, PRICE), False),
        (tagged(STOCK).removesuffix("</tool_call>"), False),
        ("<tool_call>\n{}\n</tool_call>", False),
        ("<tool_call>\nget_stock\n</tool_call>", False),
        ('<code>\nget_stock("pen")\n</code>', False),
        ("<code>\nimport os\n</code>", False),
        ("get_stock", False),
        ("", False),
    ],
)
def test_tool_call_one_call_is_compared_as_json(output: str, right: bool) -> None:
    assert score(output, json.dumps([STOCK])) == float(right)


def test_tool_call_answers_of_every_form_are_the_same() -> None:
    openai = {"type": "function", "id": "1", "function": {**STOCK, "arguments": json.dumps(STOCK["arguments"])}}
    forms = [json.dumps(STOCK), json.dumps([STOCK]), json.dumps([openai]), tagged(STOCK)]
    assert len({tuple(calls_in_answer(form)) for form in forms}) == 1


def test_tool_call_several_calls_count_in_any_order() -> None:
    assert score(tagged(PRICE, STOCK), tagged(STOCK, PRICE)) == 1
    assert score(tagged(PRICE, PRICE), tagged(STOCK, PRICE)) == score(tagged(PRICE), tagged(STOCK, PRICE)) == 0


def test_tool_call_row_without_an_answer_wants_the_calls_of_its_last_turn() -> None:
    metric = ToolCall()
    asked = metric.ask(Question("0", None, f"I will look.\n{tagged(STOCK)}"))
    assert asked is not None and metric.score(tagged(STOCK), asked.wanted) == 1
    assert metric.ask(Question("0", None, "It costs 3.")) is None


@pytest.mark.parametrize("answer", ["It costs 3.", "[]", "[3]", '{"name": 3}', "<tool_call>x</tool_call>"])
def test_tool_call_answer_without_calls_is_refused(answer: str) -> None:
    with pytest.raises(ValueError, match="found "):
        ToolCall().ask(Question("0", answer, ""))


values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text("ab'\"\\é", max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=6,
)
calls = st.fixed_dictionaries(
    {"name": st.sampled_from(["f", "g_1"]), "arguments": st.dictionaries(st.sampled_from("xyz"), values, max_size=3)}
)


@given(st.lists(calls, min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_tool_call_json_and_python_say_the_same(some: list[dict[str, Any]], rng: random.Random) -> None:
    lines = []
    for call in some:
        arguments = list(call["arguments"].items())
        rng.shuffle(arguments)
        lines.append(f"{call['name']}({', '.join(f'{name}={value!r}' for name, value in arguments)})")
    code = "<code>\n" + "\n".join(lines) + "\n</code>"
    assert calls_in(tagged(*some)) == calls_in(code) == calls_in_answer(json.dumps(some))
    assert len(calls_in(code)) == len(some)
