"""Anthropic's and OpenAI's messages and tools, as their APIs write them: one canonical form, or a reason."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_core.data.sources.files import read_files
from sft_core.data.sources.formats.conversations import canonical, row_id, to_json
from sft_core.data.sources.rejects import Rejected
from sft_core.data.sources.splits import prompt_hash

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "as in an atlas"}, "unit": {"enum": ["c", "f"]}},
    "required": ["city"],
}
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather now.", "parameters": WEATHER},
}
ANTHROPIC = {
    "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
    "tools": [{"name": "get_weather", "description": "The weather now.", "input_schema": WEATHER}],
    "messages": [
        {"role": "user", "content": "Paris and Rome?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Two calls.", "signature": "EqQBCg=="},
                {"type": "text", "text": "I look them up."},
                {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"unit": "c", "city": "Paris"}},
                {"type": "tool_use", "id": "toolu_2", "name": "get_weather", "input": {"city": "Rome"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "18"},
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_2",
                    "is_error": True,
                    "content": [{"type": "text", "text": "no such station"}],
                },
                {"type": "text", "text": "In words, please."},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "Eighteen in Paris."}]},
    ],
}
OPENAI = {
    "tools": [TOOL],
    "parallel_tool_calls": True,
    "messages": [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": "Paris and Rome?"},
        {
            "role": "assistant",
            "content": "I look them up.",
            "reasoning_content": "Two calls.",
            "tool_calls": [
                {
                    "id": "toolu_1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"unit": "c", "city": "Paris"}'},
                },
                {
                    "id": "toolu_2",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": {"city": "Rome"}},
                },
            ],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "18"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "no such station", "is_error": True},
        {"role": "user", "content": "In words, please."},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Eighteen in Paris.", "annotations": []}]},
    ],
}


def say(*messages: dict[str, Any], **row: Any) -> list[dict[str, Any]]:
    return canonical({"messages": list(messages), **row})["messages"]


def ask(answer: dict[str, Any], **row: Any) -> dict[str, Any]:
    """The canonical form of an assistant turn after a question."""
    return say({"role": "user", "content": "?"}, {"role": "assistant", **answer}, **row)[1]


def refusal(row: dict[str, Any]) -> tuple[str, str]:
    with pytest.raises(Rejected) as fault:
        canonical(row)
    return fault.value.reason, str(fault.value)


def assistant_blocks(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": list(blocks)}]}


def user_blocks(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}, {"role": "assistant", "content": "x"}]}


TEXT = {"type": "text", "text": "x"}
THINKING = {"type": "thinking", "thinking": "y", "signature": "s"}
USE = {"type": "tool_use", "id": "t", "name": "f", "input": {}}


# Anthropic and OpenAI


def test_anthropic_and_openai_rows_of_one_conversation_are_the_same():
    found = canonical(ANTHROPIC)
    assert found == canonical(OPENAI)
    assert row_id(found) == row_id(canonical(OPENAI)) and prompt_hash(found) == prompt_hash(canonical(OPENAI))
    roles = ["system", "user", "assistant", "tool", "tool", "user", "assistant"]
    assert [message["role"] for message in found["messages"]] == roles
    call, other = found["messages"][2]["tool_calls"]
    assert list(call["function"]["arguments"]) == ["unit", "city"], "a template shows the order"
    assert other == {
        "id": "toolu_2",
        "type": "function",
        "function": {"name": "get_weather", "arguments": {"city": "Rome"}},
    }
    assert found["messages"][2] | {"tool_calls": []} == {
        "role": "assistant",
        "content": "I look them up.",
        "reasoning_content": "Two calls.",
        "tool_calls": [],
    }
    result = {"role": "tool", "content": "no such station", "tool_call_id": "toolu_2", "is_error": True}
    assert found["messages"][4] == result
    assert found["tools"] == [TOOL]


def test_anthropic_row_from_parquet_is_the_same_as_from_json(tmp_path: Path):
    """Arrow gives each block every key of all of them, null where it has none; content is a list throughout."""
    lists = json.loads(json.dumps(ANTHROPIC))
    for message in lists["messages"]:
        if isinstance(message["content"], str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        for block in message["content"]:
            if isinstance(block.get("content"), str):
                block["content"] = [{"type": "text", "text": block["content"]}]
    pq.write_table(pa.Table.from_pylist([lists]), tmp_path / "a.parquet")
    ((_, row),) = read_files([tmp_path / "a.parquet"], None)
    found, expected = canonical(row), canonical(lists)
    assert found["messages"] == expected["messages"] and found["tools"] == expected["tools"]


def test_anthropic_tool_results_stand_before_the_users_own_text_and_alone_without_it():
    result = {"type": "tool_result", "tool_use_id": "t", "content": "1"}
    calls = {"role": "assistant", "content": [USE]}
    answer = {"role": "assistant", "content": "x"}
    for content, roles in (([result], ["tool"]), ([TEXT, result], ["tool", "user"])):
        found = say({"role": "user", "content": "?"}, calls, {"role": "user", "content": content}, answer)
        assert [message["role"] for message in found[2:-1]] == roles
        assert found[2] == {"role": "tool", "content": "1", "tool_call_id": "t"}
    assert found[3] == {"role": "user", "content": "x"}


def test_anthropic_tool_use_without_text_has_empty_content():
    found = ask({"content": [USE | {"input": {"a": 1}}]})
    call = {"id": "t", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert found == {"role": "assistant", "content": "", "tool_calls": [call]}


def test_anthropic_thinking_blocks_are_joined_and_mistrals_text_parts_read():
    parts = {"type": "thinking", "thinking": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert ask({"content": [THINKING, parts, TEXT]})["reasoning_content"] == "y\n\nab"


def test_anthropic_empty_thinking_says_that_the_row_does_not_think():
    row = assistant_blocks({"type": "thinking", "thinking": ""}, TEXT)
    assert canonical(row)["kwargs"] == {"enable_thinking": False}
    assert canonical(row)["messages"][1] == {"role": "assistant", "content": "x"}


def test_system_beside_the_messages_is_their_first_and_not_doubled():
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}]
    system = {"role": "system", "content": "Be brief."}
    assert say(*turns, system="Be brief.") == say(system, *turns) == say(system, *turns, system="Be brief.")
    assert say(*turns, system=None) == say(*turns, system="") == turns
    assert refusal({"messages": [system, *turns], "system": "Be long."})[0] == "two_systems"
    assert refusal({"messages": turns, "system": 5})[0] == "invalid_content"


def test_openai_function_call_and_function_result_are_a_tool_call_and_its_result():
    messages = [
        {"role": "user", "content": "Paris?"},
        {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
        },
        {"role": "function", "name": "get_weather", "content": "18"},
        {"role": "assistant", "content": "18 degrees."},
    ]
    found = canonical({"messages": messages, "functions": [TOOL["function"]]})
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
    assert found["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert found["messages"][2] == {"role": "tool", "content": "18", "name": "get_weather"}
    assert found["tools"] == [TOOL]


@pytest.mark.parametrize(
    "answer",
    [{"content": None, "refusal": "I will not."}, {"content": [{"type": "refusal", "refusal": "I will not."}]}],
)
def test_openai_refusal_is_what_the_assistant_says(answer: dict[str, Any]):
    content = ask(answer)["content"]
    assert content == "I will not." or content == [{"type": "text", "text": "I will not."}]


def test_openai_input_and_output_text_parts_are_text():
    found = say(
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "c"}]},
    )
    assert found[0]["content"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert found[1]["content"] == [{"type": "text", "text": "c"}]


def test_sharegpt_tool_call_and_response_turns_of_other_names_are_read():
    turns = [
        {"from": "human", "value": "?"},
        {"from": "tool_call", "value": '{"name": "f", "arguments": {}}'},
        {"from": "tool_response", "value": "1"},
        {"from": "gpt", "value": "x"},
    ]
    found = canonical({"conversations": turns})["messages"]
    assert [message["role"] for message in found] == ["user", "assistant", "tool", "assistant"]
    assert found[1]["tool_calls"][0]["function"]["name"] == "f"


@pytest.mark.parametrize(
    ("row", "reason", "words"),
    [
        (user_blocks(TEXT, {"type": "image", "source": {}}), "unsupported_content", "messages[0].content[1].type"),
        (user_blocks({"type": "image_url", "image_url": {"url": "x"}}), "unsupported_content", "found 'image_url'"),
        (user_blocks({"type": "document", "source": {}}), "unsupported_content", "only text is trained on"),
        (user_blocks({"type": "input_audio", "text": "x"}), "unsupported_content", "input_audio"),
        (assistant_blocks({"type": "redacted_thinking", "data": "x"}, TEXT), "unsupported_content", "redacted"),
        (assistant_blocks(THINKING | {"thinking": ""}, TEXT), "unsupported_content", "withheld"),
        (assistant_blocks({"type": "server_tool_use"}), "unsupported_content", "server_tool_use"),
        (
            user_blocks({"type": "tool_result", "content": [{"type": "image", "source": {}}]}),
            "unsupported_content",
            "messages[0].content[0].content[0].type: found 'image'",
        ),
        (assistant_blocks(TEXT, THINKING), "interleaved_blocks", "thinking after"),
        (assistant_blocks(USE, TEXT), "interleaved_blocks", "text after"),
        (assistant_blocks({"type": "tool_result", "content": "1"}), "invalid_content", "belongs to users"),
        (user_blocks(USE), "invalid_content", "belongs to assistants"),
        (user_blocks(THINKING), "invalid_content", "belongs to assistants"),
        (user_blocks({"type": "text"}), "invalid_content", "without text"),
        (assistant_blocks({"type": "thinking", "thinking": 5}), "invalid_content", "without its text"),
        (assistant_blocks({"type": "tool_use", "id": "t", "input": {}}), "invalid_tool_calls", "names no function"),
        (assistant_blocks(USE | {"input": [1]}), "invalid_tool_calls", "is an object; found list"),
    ],
)
def test_blocks_that_cannot_be_trained_refuse_their_row_with_a_reason(row: dict[str, Any], reason: str, words: str):
    found, message = refusal(row)
    assert found == reason
    assert words in message


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"content": [USE], "tool_calls": [{"name": "f"}]}, "invalid_tool_calls"),
        ({"content": "", "function_call": {"name": "f"}, "tool_calls": [{"name": "f"}]}, "invalid_tool_calls"),
        ({"content": "", "function_call": {"arguments": "{}"}}, "invalid_tool_calls"),
        ({"content": "", "tool_calls": [{"name": "f", "arguments": "[1]"}]}, "invalid_tool_calls"),
        ({"content": [THINKING, TEXT], "reasoning_content": "z"}, "invalid_message"),
        ({"content": "x", "refusal": "y"}, "invalid_message"),
        ({"content": None, "refusal": 5}, "invalid_message"),
    ],
)
def test_things_said_twice_or_malformed_refuse_their_row(answer: dict[str, Any], reason: str):
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", **answer}]
    assert refusal({"messages": turns})[0] == reason


def test_tool_call_arguments_encoded_twice_are_an_object():
    call = {"name": "f", "arguments": json.dumps(json.dumps({"a": 1}))}
    assert ask({"content": None, "tool_calls": [call]})["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert ask({"tool_calls": [{"name": "f", "arguments": None}]})["tool_calls"][0]["function"]["arguments"] == {}


# Tools


def tools_of(tools: Any) -> list[dict[str, Any]]:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}]
    return canonical({"messages": turns, "tools": tools})["tools"]


FUNCTION = TOOL["function"]


@pytest.mark.parametrize(
    "tool",
    [
        TOOL,
        {"function": FUNCTION},
        FUNCTION,
        {"type": "function", **FUNCTION},
        {"name": "get_weather", "description": "The weather now.", "input_schema": WEATHER},
        {"type": "custom", "name": "get_weather", "description": "The weather now.", "input_schema": WEATHER},
        {"name": "get_weather", "description": "The weather now.", "inputSchema": WEATHER},
        ANTHROPIC["tools"][0] | {"cache_control": {"type": "ephemeral"}},
        json.dumps(FUNCTION),
    ],
    ids=["openai", "no type", "bare", "flat", "anthropic", "custom", "mcp", "cache_control", "json"],
)
def test_tools_of_each_style_are_one_and_their_keys_keep_their_order(tool: Any):
    for tools in ([tool], json.dumps([tool])):
        found = tools_of(tools)
        assert found == [TOOL]
        assert json.dumps(found[0]["function"]["parameters"]) == json.dumps(WEATHER)
        assert list(found[0]["function"]) == ["name", "description", "parameters"]


def test_tools_what_else_they_say_is_kept():
    function = {"strict": True, **FUNCTION, "return": {"type": "string"}}
    assert json.dumps(tools_of([function])) == json.dumps([{"type": "function", "function": function}])
    wrapped = {"type": "function", "function": function, "x": 1}
    assert json.dumps(tools_of([wrapped])) == json.dumps([wrapped])


def test_tools_given_to_a_template_by_its_own_variables_stay_as_they_are():
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}]
    kwargs = {"xml_tools": [FUNCTION], "python_tools": ["def f(): ..."]}
    assert canonical({"messages": turns, "chat_template_kwargs": kwargs})["kwargs"] == kwargs


@pytest.mark.parametrize(
    ("tool", "reason"),
    [
        ("get_weather", "invalid_tools"),
        ("5", "invalid_tools"),
        (5, "invalid_tools"),
        ({"type": "function"}, "invalid_tools"),
        ({"function": {"description": "x"}}, "invalid_tools"),
        ({**FUNCTION, "input_schema": {}}, "invalid_tools"),
        ({"type": "bash_20250124", "name": "bash"}, "unsupported_tool"),
    ],
)
def test_tools_that_are_none_refuse_their_row(tool: Any, reason: str):
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}]
    found, message = refusal({"messages": turns, "tools": [tool]})
    assert found == reason
    assert "tools[0]" in message


# Stability

texts = st.sampled_from(["x", "", "  y\n", "<think>a</think>b", "<think></think><think>a</think>b", "é🙂", "[1]"])
objects = st.dictionaries(st.sampled_from(["a", "b"]), st.integers() | texts, max_size=2)
maybe_text = st.none() | texts
calls = st.lists(
    st.fixed_dictionaries(
        {"name": st.just("f"), "arguments": objects | objects.map(json.dumps) | st.none()},
        optional={"id": st.sampled_from(["c1", ""])},
    ),
    max_size=2,
)
text_block = st.builds(lambda kind, text: {"type": kind, "text": text}, st.sampled_from(["text", "output_text"]), texts)
thinking_block = texts.map(lambda text: {"type": "thinking", "thinking": text})
use_block = objects.map(lambda arguments: {"type": "tool_use", "id": "c1", "name": "f", "input": arguments})
result_block = st.builds(
    lambda content, bad: {"type": "tool_result", "tool_use_id": "c1", "content": content, "is_error": bad},
    maybe_text | st.lists(text_block, max_size=2),
    st.booleans(),
)
choice = st.fixed_dictionaries(
    {}, optional={"train": st.none() | st.booleans(), "weight": st.sampled_from([0, 1, 0.5, 2])}
)
assistant = st.builds(
    lambda fields, chosen: {"role": "assistant", **fields, **chosen},
    st.fixed_dictionaries(
        {"content": maybe_text | st.lists(thinking_block | text_block | use_block, max_size=3)},
        optional={"reasoning_content": maybe_text, "tool_calls": calls, "refusal": maybe_text},
    ),
    choice,
)
user = st.builds(
    lambda content: {"role": "user", "content": content}, texts | st.lists(text_block | result_block, max_size=3)
)
rows = st.fixed_dictionaries(
    {"messages": st.lists(user | assistant, min_size=1, max_size=4).map(lambda turns: [*turns, {**turns[-1]}])},
    optional={
        "system": maybe_text,
        "tools": st.lists(st.sampled_from([TOOL, FUNCTION, ANTHROPIC["tools"][0]]), max_size=2),
        "chat_template_kwargs": st.sampled_from([{}, {"enable_thinking": True}, {"xml_tools": [FUNCTION]}]),
        "answer": st.integers(),
    },
)


def as_row(conversation: dict[str, Any]) -> dict[str, Any]:
    """A canonical conversation as a row: only its template variables have another name there."""
    row = json.loads(to_json(conversation))
    return row | ({"chat_template_kwargs": row.pop("kwargs")} if "kwargs" in row else {})


@pytest.mark.slow
def test_canonical_of_its_own_form_is_the_same_and_anything_else_is_refused_with_a_reason():
    reasons: dict[str, int] = {}

    @settings(max_examples=500, deadline=None)
    @given(row=rows)
    def check(row: dict[str, Any]) -> None:
        try:
            found = canonical(row)
        except Rejected as fault:
            assert fault.reason and str(fault)
            reasons[fault.reason] = reasons.get(fault.reason, 0) + 1
            return
        reasons[""] = reasons.get("", 0) + 1
        assert to_json(canonical(as_row(found))) == to_json(found)
        assert {key for message in found["messages"] for key in message} <= {
            *("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name", "is_error"),
            *("train", "weight"),
        }

    check()
    assert reasons[""] > 100 and len(reasons) > 4, reasons


@pytest.mark.parametrize("row", [ANTHROPIC, OPENAI], ids=["anthropic", "openai"])
def test_canonical_of_a_known_row_read_again_is_the_same(row: dict[str, Any]):
    assert to_json(canonical(as_row(canonical(row)))) == to_json(canonical(row))
