"""Canonical conversations: each format that users have, and each reason for which a row is refused."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from sft_core.data.sources.formats.conversations import canonical, row_id, to_json
from sft_core.data.sources.rejects import Rejected

USER = {"role": "user", "content": "Hello"}
ANSWER = {"role": "assistant", "content": "Hi."}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def say(*messages: dict[str, Any], **row: Any) -> dict[str, Any]:
    return canonical({"messages": list(messages), **row})


def refusal(row: Any, format: str = "auto") -> tuple[str, str]:
    with pytest.raises(Rejected) as fault:
        canonical(row, format=format)
    return fault.value.reason, str(fault.value)


# Formats


def test_messages_roles_under_other_names_become_the_four():
    names = ["developer", "human", "gpt", "observation", "model", "function", "assistant"]
    found = say(*({"role": name, "content": name} for name in names))["messages"]
    roles = ["system", "user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert [(message["role"], message["content"]) for message in found] == list(zip(roles, names, strict=True))


def test_messages_nothing_optional_given_leaves_only_messages():
    empty = {"tools": None, "chat_template_kwargs": None, "answer": None, "source": "x"}
    found = say(USER | {"tool_calls": None, "name": None}, ANSWER | {"reasoning_content": None}, **empty)
    assert found == {"messages": [USER, ANSWER]}


def test_messages_as_a_json_string_are_read():
    assert canonical({"messages": json.dumps([USER, ANSWER])}) == {"messages": [USER, ANSWER]}


def test_messages_name_and_tool_call_id_are_kept():
    result = {"role": "tool", "content": "3", "name": "add", "tool_call_id": "c1"}
    assert say(USER, result, ANSWER)["messages"][1] == result


def test_messages_answer_that_is_a_number_becomes_text():
    assert say(USER, ANSWER, answer=0)["answer"] == "0"
    assert say(USER, ANSWER, answer={"é": [1, None]})["answer"] == '{"é":[1,null]}', "what is no text is JSON"


def test_sharegpt_system_column_and_turns():
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]
    found = canonical({"system": "Be brief.", "conversations": turns})
    assert found == {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER]}


def test_sharegpt_function_call_becomes_a_tool_call():
    call = {"name": "add", "arguments": {"a": 1}}
    turns = [
        {"from": "human", "value": "1+2"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "3"},
        {"from": "function_call", "value": json.dumps([call, call])},
        {"from": "gpt", "value": "It is 3."},
    ]
    found = canonical({"conversations": turns, "tools": json.dumps([TOOL])})
    assert [message["role"] for message in found["messages"]] == ["user", "assistant", "tool", "assistant", "assistant"]
    assert found["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert found["messages"][3]["tool_calls"] == [CALL, CALL]
    assert found["tools"] == [TOOL]


def test_sharegpt_column_with_role_and_content_is_read():
    assert canonical({"conversations": [USER, ANSWER]}) == {"messages": [USER, ANSWER]}


def test_sharegpt_format_given_reads_the_messages_column():
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]
    assert canonical({"messages": turns}, format="sharegpt") == {"messages": [USER, ANSWER]}


def test_alpaca_instruction_input_and_history_in_order():
    history = [["Hello", "Hi."], ["Bye", "See you."]]
    row = {"system": "Be brief.", "instruction": "Add", "input": "1 2", "output": "3", "history": history}
    assert [(message["role"], message["content"]) for message in canonical(row)["messages"]] == [
        ("system", "Be brief."),
        ("user", "Hello"),
        ("assistant", "Hi."),
        ("user", "Bye"),
        ("assistant", "See you."),
        ("user", "Add\n\n1 2"),
        ("assistant", "3"),
    ]


@pytest.mark.parametrize("empty", ["", None])
def test_alpaca_without_input_has_the_instruction_alone(empty: str | None):
    row = {"instruction": "Hello", "input": empty, "output": "Hi.", "history": None}
    assert canonical(row) == {"messages": [USER, ANSWER]}


def test_prompt_completion_strings_and_message_lists_are_the_same():
    assert canonical({"prompt": "Hello", "completion": "Hi."}) == {"messages": [USER, ANSWER]}
    assert canonical({"prompt": [USER], "completion": [ANSWER]}) == {"messages": [USER, ANSWER]}


def test_prompt_completion_an_answer_in_the_prompt_is_context_unless_it_chooses_itself():
    row = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    assert canonical(row)["messages"] == [USER, {**ANSWER, "train": False}, USER, ANSWER]
    chosen = {"prompt": [USER, {**ANSWER, "train": True}, USER], "completion": [ANSWER]}
    assert canonical(chosen)["messages"] == [USER, ANSWER, USER, ANSWER]


def test_text_is_kept_as_it_is():
    assert canonical({"text": " a <think>b</think> "}) == {"text": " a <think>b</think> "}
    assert canonical({"text": "a", "messages": [USER, ANSWER]}, format="text") == {"text": "a"}


def test_format_auto_takes_the_column_that_is_set():
    row = {"messages": None, "conversations": None, "prompt": "Hello", "completion": "Hi."}
    assert canonical(row) == {"messages": [USER, ANSWER]}


# Tools


def test_tools_as_list_or_json_string_are_the_same():
    assert say(USER, ANSWER, tools=[TOOL])["tools"] == say(USER, ANSWER, tools=json.dumps([TOOL]))["tools"] == [TOOL]


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"function": {"name": "add", "arguments": '{"a": 1}'}},
        {"name": "add", "arguments": {"a": 1}},
        {"name": "add", "parameters": '{"a": 1}'},
    ],
)
def test_tool_calls_arguments_as_dict_or_json_string_are_the_same(call: dict[str, Any]):
    found = say(USER, {"role": "assistant", "content": None, "tool_calls": [call]})["messages"][1]
    assert found == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_tool_calls_id_and_empty_arguments_are_kept():
    call = {"id": "c1", "function": {"name": "now", "arguments": ""}}
    assert say(USER, {**ANSWER, "tool_calls": [call]})["messages"][1]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "now", "arguments": {}}}
    ]


# Thinking


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_under_each_name_becomes_reasoning_content(key: str):
    assert say(USER, ANSWER | {key: "\nThey greet.\n"})["messages"][1] == ANSWER | {"reasoning_content": "They greet."}


def test_reasoning_inline_at_the_start_is_taken_out():
    inline = {"role": "assistant", "content": "\n<think>\n  They greet.\n</think>\n\nHi."}
    assert say(USER, inline)["messages"][1] == ANSWER | {"reasoning_content": "  They greet."}


@pytest.mark.parametrize("content", ["Hi. <think>x</think>", "<think>never closed", "</think>Hi."])
def test_reasoning_not_a_leading_block_stays_content(content: str):
    inline = {"role": "assistant", "content": content}
    assert say(USER, inline)["messages"][1] == inline


@pytest.mark.parametrize("block", ["<think>\n\n</think>\n\n", "<think></think>"])
def test_reasoning_empty_block_is_no_reasoning(block: str):
    assert say(USER, {"role": "assistant", "content": f"{block}Hi."})["messages"][1] == ANSWER


def test_reasoning_given_leaves_an_inline_block_in_the_content():
    both = {"role": "assistant", "content": "<think>x</think>Hi.", "reasoning_content": "They greet."}
    assert say(USER, both)["messages"][1] == both


def test_reasoning_typed_by_a_user_stays_text():
    typed = {"role": "user", "content": "<think>x</think>Hello", "reasoning_content": "x"}
    assert say(typed, ANSWER)["messages"][0] == {"role": "user", "content": "<think>x</think>Hello"}


# Content and template kwargs


def test_content_list_of_parts_keeps_their_text():
    parts = [{"type": "text", "text": "Hel", "image": None}, {"text": "lo"}, {"type": "text", "text": ""}]
    found = say({"role": "user", "content": parts}, ANSWER)["messages"][0]
    assert found["content"] == [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]


@pytest.mark.parametrize("written", [dict, json.dumps], ids=["object", "json"])
def test_template_kwargs_none_is_dropped_and_false_is_kept(written: Callable[[dict], Any]):
    found = say(USER, ANSWER, chat_template_kwargs=written({"enable_thinking": False, "xml_tools": None}))
    assert found["kwargs"] == {"enable_thinking": False}


def test_template_kwargs_all_none_are_as_if_not_given():
    assert "kwargs" not in say(USER, ANSWER, chat_template_kwargs={"enable_thinking": None})


# Refusals


def with_answer(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER, ANSWER | fields]}


@pytest.mark.parametrize(
    ("row", "reason", "words"),
    [
        ("Hello", "not_an_object", "found str"),
        (None, "not_an_object", "found NoneType"),
        ({"question": "Hello"}, "no_messages", "(question)"),
        ({"messages": []}, "no_messages", "no messages"),
        ({"messages": {"role": "user"}}, "no_messages", "found dict"),
        ({"messages": "Hello"}, "invalid_json", "not JSON"),
        ({"messages": [USER]}, "no_assistant_turn", "no assistant turn"),
        ({"instruction": "Hello"}, "no_assistant_turn", "`output`"),
        ({"instruction": "", "output": "Hi."}, "no_prompt", "`instruction`"),
        ({"instruction": 5, "output": "Hi."}, "no_prompt", "`instruction`"),
        ({"completion": "Hi."}, "no_prompt", "`prompt`"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "invalid_message", "history[0]"),
        ({"instruction": "a", "output": "b", "history": 5}, "invalid_json", "history"),
        ({"messages": [USER, {"role": "bot", "content": "Hi."}]}, "unknown_role", "messages[1].role: found 'bot'"),
        ({"messages": [USER, {"role": ["user"], "content": "Hi."}]}, "unknown_role", "found ['user']"),
        ({"messages": ["Hello"]}, "invalid_message", "messages[0] is not an object"),
        ({"conversations": ["Hello"]}, "invalid_message", "conversations[0] is not an object"),
        ({"conversations": [{"from": "function_call", "value": "add(1)"}]}, "invalid_json", "function_call"),
        (with_answer(content=""), "empty_assistant_turn", "messages[1]"),
        (with_answer(content=[{"text": ""}]), "empty_assistant_turn", "messages[1]"),
        (with_answer(content=5), "invalid_content", "messages[1].content"),
        (with_answer(content=["Hi."]), "invalid_content", "list of text parts"),
        (with_answer(thinking=["x"]), "invalid_message", "reasoning_content"),
        (with_answer(tool_calls=[{"id": "x"}]), "invalid_tool_calls", "names no function"),
        (with_answer(tool_calls=[{"name": "a", "arguments": "{"}]), "invalid_tool_calls", "[0].arguments is not JSON"),
        ({**with_answer(), "tools": "add"}, "invalid_json", "`tools`"),
        ({**with_answer(), "tools": {"name": "add"}}, "invalid_json", "found dict"),
        ({**with_answer(), "chat_template_kwargs": "think"}, "invalid_kwargs", "not JSON"),
        ({**with_answer(), "chat_template_kwargs": [True]}, "invalid_kwargs", "found list"),
        ({"text": ""}, "no_text", "`text`"),
        ({"text": 5}, "no_text", "`text`"),
    ],
)
def test_refusal_has_a_reason_and_says_where(row: Any, reason: str, words: str):
    found, message = refusal(row)
    assert found == reason
    assert words in message


def test_refusal_of_an_unknown_role_names_the_known_ones():
    _, message = refusal({"messages": [{"role": "bot", "content": "Hi."}]})
    assert message.endswith("known: system, user, assistant, tool")


def test_refusal_of_a_format_that_the_row_does_not_have():
    assert refusal({"text": "a"}, format="messages")[0] == "no_messages"
    assert refusal({"messages": [USER, ANSWER]}, format="text")[0] == "no_text"


# Identity


def test_row_id_is_of_the_content_and_not_of_how_it_was_written():
    sharegpt = {"conversations": [{"value": "Hello", "from": "human"}, {"from": "gpt", "value": "Hi."}]}
    same = [{"messages": [USER, ANSWER]}, sharegpt, {"completion": "Hi.", "prompt": "Hello", "id": 7}]
    ids = {row_id(to_json(canonical(row))) for row in same}
    assert len(ids) == 1
    assert row_id(to_json(say(USER, ANSWER | {"content": "Hi!"}))) not in ids


def test_user_turn_without_content_is_rejected() -> None:
    row = {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "x"}]}
    with pytest.raises(Rejected, match="without content") as fault:
        canonical(row)
    assert fault.value.reason == "invalid_content"


def test_keys_of_tools_and_arguments_keep_their_order() -> None:
    call = {"name": "weather", "arguments": {"unit": "c", "city": "Paris"}}
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    kept = json.loads(to_json(canonical(row)))["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert list(kept) == ["unit", "city"]
    call["arguments"] = {"city": "Paris", "unit": "c"}
    other = canonical({"messages": [row["messages"][0], {"role": "assistant", "content": "", "tool_calls": [call]}]})
    assert row_id(other) == row_id(canonical(row)), "the same content"


def test_inline_empty_block_says_that_the_row_does_not_think() -> None:
    def conversation(*contents: str, **row: object) -> dict:
        messages = [{"role": "user", "content": "a"}]
        for content in contents:
            messages.append({"role": "assistant", "content": content})
        return canonical({"messages": messages, **row})

    assert conversation("<think>\n\n</think>\n\nb")["kwargs"] == {"enable_thinking": False}
    assert conversation("<think>\n\n</think>\n\nb")["messages"][1] == {"role": "assistant", "content": "b"}
    asked = {"chat_template_kwargs": {"enable_thinking": True}}
    assert conversation("<think>\n\n</think>\n\nb", **asked)["kwargs"] == {"enable_thinking": True}
    assert "kwargs" not in conversation("<think>\n\n</think>\n\nb", "<think>\nr\n</think>\n\nc")
    assert "kwargs" not in conversation("b")


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
def test_kwargs_that_the_conversation_itself_gives_are_rejected(name: str) -> None:
    row = {"messages": [{"role": "assistant", "content": "x"}], "chat_template_kwargs": {name: []}}
    with pytest.raises(Rejected, match=name) as fault:
        canonical(row)
    assert fault.value.reason == "invalid_kwargs"
