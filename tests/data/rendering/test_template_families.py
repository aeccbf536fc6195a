"""What each family of chat templates trains, said here span by span; no marker in a template is needed.

The answers' words stand in Ⓐ1, Ⓐ2, ..., the thoughts in ⓣ1, ⓣ2. Where a template rewrites its history there is a row
for each turn that would be served another text than was written.
"""

from typing import Any

import numpy as np
import pytest

from sft_core.data.sources.rejects import Rejected
from sft_core.data.tokenizer.tokenizer import control_tokens
from tests.data.families import (
    FAMILIES,
    Chat,
    assistant,
    call,
    control_of,
    family,
    result,
    spoken,
    system,
    talk,
    tool,
    unspoken,
    user,
    vocabulary,
)

IM_END, EOT, EOS, CUT, RETURN = "<|im_end|>", "<|eot_id|>", "</s>", "<｜end▁of▁sentence｜>", "<|return|>"
CALLED = assistant("", tool_calls=[call(a=1, b="zwei")])
SHAPES: dict[str, dict[str, Any]] = {
    "plain": talk(user("Q1"), assistant("Ⓐ1 Hi."), user("Q2"), assistant("Ⓐ2 So.")),
    "system": talk(system("Be kind."), user("Q1"), assistant("Ⓐ1 Hi."), user("Q2"), assistant("Ⓐ2 So.")),
    "no_think": talk(user("Q1"), assistant("Ⓐ1 Hi."), user("Q2"), assistant("Ⓐ2 So."), enable_thinking=False),
    "unicode": talk(
        user("naïve 👋🏽 \u202e½"), assistant("Ⓐ1 Ça 👩‍🚀 中文\u00a0…"), user("再"), assistant("Ⓐ2 e\u0301")
    ),
    "spaces": talk(user("\n Q1 \n"), assistant("\n\n Ⓐ1 Hi.\n\n"), user("  "), assistant("  Ⓐ2\t")),
    "two users": talk(user("Q1"), user("Q2"), assistant("Ⓐ1 Hi.")),
    "tools": talk(
        user("1+2?"), CALLED, result("③"), assistant("Ⓐ2 Three."), user("Q2"), assistant("Ⓐ3 So."), tools=[tool()]
    ),
    "call with words": talk(
        user("1+2?"),
        assistant("Ⓐ1 I add.", tool_calls=[call(a=1, b="zwei")]),
        result("③"),
        assistant("Ⓐ2 Three."),
        tools=[tool()],
    ),
    "two calls": talk(
        user("1+2?"),
        assistant("", tool_calls=[call(a=1, b="zwei"), call(2, a=7)]),
        result("③"),
        result("④", 2),
        assistant("Ⓐ2 Both."),
        tools=[tool()],
    ),
    "thinking": talk(user("Q1"), assistant("Ⓐ1 Hi.", "ⓣ1"), user("Q2"), assistant("Ⓐ2 So.", "ⓣ2")),
    "thinks once": talk(
        user("Q1"), assistant("Ⓐ1 Hi.", "ⓣ1"), user("Q2"), assistant("Ⓐ2 So."), user("Q3"), assistant("Ⓐ3 No.")
    ),
    "tools and thinking": talk(
        user("1+2?"),
        {**CALLED, "reasoning_content": "ⓣ1"},
        result("③"),
        assistant("Ⓐ2 Three.", "ⓣ2"),
        user("Q2"),
        assistant("Ⓐ3 So."),
        tools=[tool()],
    ),
}
Rows = list[list[str]]
WORDS = {
    "plain": ["Ⓐ1 Hi.", "Ⓐ2 So."],
    "system": ["Ⓐ1 Hi.", "Ⓐ2 So."],
    "no_think": ["Ⓐ1 Hi.", "Ⓐ2 So."],
    "unicode": ["Ⓐ1 Ça 👩‍🚀 中文\u00a0…", "Ⓐ2 e\u0301"],
    "spaces": ["\n\n Ⓐ1 Hi.\n\n", "  Ⓐ2\t"],
    "two users": ["Ⓐ1 Hi."],
}
TRIMMED = WORDS | {"spaces": ["Ⓐ1 Hi.", "Ⓐ2"]}


def one_row(stop: str, words: dict[str, list[str]] = WORDS, before: str = "") -> dict[str, Rows]:
    return {shape: [[f"{before}{text}{stop}" for text in texts]] for shape, texts in words.items()}


def row_a_turn(stop: str, before: str = "") -> dict[str, Rows]:
    return {shape: [[f"{before}{text}{stop}"] for text in texts] for shape, texts in WORDS.items()}


NO_TOOLS = dict.fromkeys(("tools", "call with words", "two calls"), "template_drops_tool_calls")
NO_THINKING = dict.fromkeys(("thinking", "thinks once", "tools and thinking"), "template_drops_thinking")
ALTERNATE = {"two users": "template_error: user and assistant take turns"}
# A vocabulary that merges a header's newline with an answer's writes that history otherwise than it was generated.
MERGED = {"spaces": [[f"\n\n Ⓐ1 Hi.\n\n{IM_END}"], [f"  Ⓐ2\t{IM_END}"]]}
CHATML = one_row(IM_END) | MERGED | NO_TOOLS | NO_THINKING
HERMES = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "zwei"}}\n</tool_call>'
HERMES_2 = '<tool_call>\n{"name": "add", "arguments": {"a": 7}}\n</tool_call>'
EMPTY, THOUGHT, THOUGHT_2 = (f"<think>\n{text}\n</think>\n\n" for text in ("", "ⓣ1", "ⓣ2"))
CLOSE = "\n</think>\n\n"
MISTRAL = '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": "zwei"}, "id": "call00001"}'
DEEPSEEK, DEEPSEEK_2 = (
    f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{arguments}\n```<｜tool▁call▁end｜>"
    for arguments in ('{"a": 1, "b": "zwei"}', '{"a": 7}')
)
CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", f"<｜tool▁calls▁end｜>{CUT}"
HARMONY = ' to=functions.add<|channel|>commentary json<|message|>{"a": 1, "b": "zwei"}<|call|>'
FINAL = "<|channel|>final<|message|>"
PYTHON = '<function_calls>add(a=1, b="zwei")'
END = "<|endoftext|>"
EXPECTED: dict[str, dict[str, Rows | str]] = {
    "chatml": CHATML,
    "chatml_marked": CHATML,
    "llama3": one_row(EOT, TRIMMED)
    | NO_THINKING
    | {
        "tools": [['{"name": "add", "parameters": {"a": 1, "b": "zwei"}}' + EOT, f"Ⓐ2 Three.{EOT}", f"Ⓐ3 So.{EOT}"]],
        "call with words": "template_changes_content",
        "two calls": "template_error: one tool call a turn",
    },
    "qwen2_5": one_row(IM_END)
    | MERGED
    | NO_THINKING
    | {
        "tools": [[f"{HERMES}{IM_END}", f"Ⓐ2 Three.{IM_END}", f"Ⓐ3 So.{IM_END}"]],
        "call with words": [[f"Ⓐ1 I add.\n{HERMES}{IM_END}", f"Ⓐ2 Three.{IM_END}"]],
        "two calls": [[f"{HERMES}\n{HERMES_2}{IM_END}", f"Ⓐ2 Both.{IM_END}"]],
    },
    "qwen3": row_a_turn(IM_END, EMPTY)
    | {
        "spaces": [[f"{EMPTY} Ⓐ1 Hi.\n\n{IM_END}"], [f"{EMPTY}  Ⓐ2\t{IM_END}"]],
        "no_think": [[f"Ⓐ1 Hi.{IM_END}"], [f"Ⓐ2 So.{IM_END}"]],
        "tools": [[f"{EMPTY}{HERMES}{IM_END}"], [f"{EMPTY}Ⓐ2 Three.{IM_END}"], [f"{EMPTY}Ⓐ3 So.{IM_END}"]],
        "call with words": [[f"{EMPTY}Ⓐ1 I add.\n{HERMES}{IM_END}"], [f"{EMPTY}Ⓐ2 Three.{IM_END}"]],
        "two calls": [[f"{EMPTY}{HERMES}\n{HERMES_2}{IM_END}"], [f"{EMPTY}Ⓐ2 Both.{IM_END}"]],
        "thinking": [[f"{THOUGHT}Ⓐ1 Hi.{IM_END}"], [f"{THOUGHT_2}Ⓐ2 So.{IM_END}"]],
        "thinks once": [[f"{THOUGHT}Ⓐ1 Hi.{IM_END}"], [f"{EMPTY}Ⓐ2 So.{IM_END}"], [f"{EMPTY}Ⓐ3 No.{IM_END}"]],
        "tools and thinking": [
            [f"{THOUGHT}{HERMES}{IM_END}", f"{THOUGHT_2}Ⓐ2 Three.{IM_END}"],
            [f"{EMPTY}Ⓐ3 So.{IM_END}"],
        ],
    },
    # The project's own, which shows all thinking in history.
    "thinking": one_row(IM_END)
    | MERGED
    | {
        "tools": [[f"{HERMES}{IM_END}", f"Ⓐ2 Three.{IM_END}", f"Ⓐ3 So.{IM_END}"]],
        "call with words": [[f"Ⓐ1 I add.\n{HERMES}{IM_END}", f"Ⓐ2 Three.{IM_END}"]],
        "two calls": [[f"{HERMES}\n{HERMES_2}{IM_END}", f"Ⓐ2 Both.{IM_END}"]],
        "thinking": [[f"{THOUGHT}Ⓐ1 Hi.{IM_END}", f"{THOUGHT_2}Ⓐ2 So.{IM_END}"]],
        "thinks once": [[f"{THOUGHT}Ⓐ1 Hi.{IM_END}", f"Ⓐ2 So.{IM_END}", f"Ⓐ3 No.{IM_END}"]],
        "tools and thinking": [[f"{THOUGHT}{HERMES}{IM_END}", f"{THOUGHT_2}Ⓐ2 Three.{IM_END}", f"Ⓐ3 So.{IM_END}"]],
    },
    "gemma": one_row("<end_of_turn>", TRIMMED) | ALTERNATE | NO_TOOLS | NO_THINKING,
    "gemma2": one_row("<end_of_turn>", TRIMMED)
    | ALTERNATE
    | NO_TOOLS
    | NO_THINKING
    | {"system": "template_error: there is no system role"},
    "mistral": one_row(EOS, before=" ")
    | ALTERNATE
    | NO_THINKING
    | {
        "system": [[f" Ⓐ1 Hi.{EOS}"], [f" Ⓐ2 So.{EOS}"]],
        "tools": [[f"{MISTRAL}]{EOS}", f" Ⓐ2 Three.{EOS}"], [f" Ⓐ3 So.{EOS}"]],
        "call with words": "template_changes_content",
        "two calls": [
            [f'{MISTRAL}, {{"name": "add", "arguments": {{"a": 7}}, "id": "call00002"}}]{EOS}', f" Ⓐ2 Both.{EOS}"]
        ],
    },
    "deepseek_r1": row_a_turn(CUT, CLOSE)
    | {
        # After a result nothing is opened, and nothing shared with a history in which the call has no think block.
        "tools": [[f"{CLOSE}{CALLS}{DEEPSEEK}{CALLS_END}"], [f"Ⓐ2 Three.{CUT}", f"{CLOSE}Ⓐ3 So.{CUT}"]],
        "call with words": [[f"{CLOSE}Ⓐ1 I add.{CALLS}{DEEPSEEK}{CALLS_END}"], [f"Ⓐ2 Three.{CUT}"]],
        "two calls": [[f"{CLOSE}{CALLS}{DEEPSEEK}{DEEPSEEK_2}{CALLS_END}"], [f"Ⓐ2 Both.{CUT}"]],
        "thinking": [[f"ⓣ1{CLOSE}Ⓐ1 Hi.{CUT}"], [f"ⓣ2{CLOSE}Ⓐ2 So.{CUT}"]],
        "thinks once": [[f"ⓣ1{CLOSE}Ⓐ1 Hi.{CUT}"], [f"{CLOSE}Ⓐ2 So.{CUT}"], [f"{CLOSE}Ⓐ3 No.{CUT}"]],
        "tools and thinking": "template_drops_thinking",
    },
    "smollm3": one_row(IM_END) | NO_TOOLS | NO_THINKING | {"spaces": [[f" Ⓐ1 Hi.\n\n{IM_END}", f"  Ⓐ2\t{IM_END}"]]},
    "gpt_oss": row_a_turn(RETURN, FINAL)
    | {
        "tools": [[f"{FINAL}Ⓐ2 Three.{RETURN}"], [HARMONY, f"{FINAL}Ⓐ3 So.{RETURN}"]],
        "call with words": [
            [f"<|channel|>analysis<|message|>Ⓐ1 I add.<|end|><|start|>assistant{HARMONY}", f"{FINAL}Ⓐ2 Three.{RETURN}"]
        ],
        "two calls": "template_drops_tool_calls",
        "thinking": [
            [f"<|channel|>analysis<|message|>ⓣ1<|end|><|start|>assistant{FINAL}Ⓐ1 Hi.{RETURN}"],
            [f"<|channel|>analysis<|message|>ⓣ2<|end|><|start|>assistant{FINAL}Ⓐ2 So.{RETURN}"],
        ],
        "thinks once": [
            [f"<|channel|>analysis<|message|>ⓣ1<|end|><|start|>assistant{FINAL}Ⓐ1 Hi.{RETURN}"],
            [f"{FINAL}Ⓐ2 So.{RETURN}"],
            [f"{FINAL}Ⓐ3 No.{RETURN}"],
        ],
        # The answer is served the thinking before its call, which is gone as soon as it stands.
        "tools and thinking": [
            [
                f"<|channel|>analysis<|message|>ⓣ1<|end|><|start|>assistant{HARMONY}",
                f"<|channel|>analysis<|message|>ⓣ2<|end|><|start|>assistant{FINAL}Ⓐ2 Three.{RETURN}",
            ],
            [f"{FINAL}Ⓐ3 So.{RETURN}"],
        ],
    },
    "olmo2": one_row(END) | NO_TOOLS | NO_THINKING | {"spaces": [[f"\n\n Ⓐ1 Hi.\n\n{END}"], [f"  Ⓐ2\t{END}"]]},
    # The end token of a text that ends with the turn is <|im_end|> in its history.
    "olmo3": row_a_turn(END)
    | NO_THINKING
    | {
        "tools": [[f"{PYTHON}</function_calls>{END}"], [f"Ⓐ2 Three.{END}"], [f"Ⓐ3 So.{END}"]],
        "call with words": [[f"Ⓐ1 I add.{PYTHON}</function_calls>{END}"], [f"Ⓐ2 Three.{END}"]],
        "two calls": [[f"{PYTHON}\nadd(a=7)</function_calls>{END}"], [f"Ⓐ2 Both.{END}"]],
    },
}


def check_as_served(chat: Chat, conversation: dict[str, Any]) -> None:
    """Each assistant turn is trained once, right after the tokens of its prompt as a server makes them."""
    rows = chat.rows(conversation)
    waiting = [index for index, message in enumerate(conversation["messages"]) if message["role"] == "assistant"]
    assert len(waiting) == sum(len(row.spans) for row in rows) > 0
    for row, found in zip(rows, chat.proved(conversation, rows), strict=True):
        ids = found.input_ids.tolist()
        assert chat.vocabulary.decode(ids) == row.text
        runs = np.flatnonzero(np.diff(found.trained.astype(int), prepend=0, append=0)).reshape(-1, 2)
        assert [chat.vocabulary.decode(ids[start:end]) for start, end in runs] == spoken(row)
        for start, _ in runs.tolist():
            served = [index for index in waiting if chat.served_prompt(conversation, index) == ids[:start]]
            assert served, f"no prompt is {chat.vocabulary.decode(ids[:start])!r}"
            waiting.remove(served[0])
    assert not waiting


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_family_trains_exactly_what_is_expected_as_it_is_served(name: str, shape: str):
    chat, conversation, expected = family(name), SHAPES[shape], EXPECTED[name][shape]
    assert chat.outcome(conversation) == expected
    if isinstance(expected, str):
        return
    rows = chat.rows(conversation)
    for row in rows:
        for mark in ("Ⓐ1", "Ⓐ2", "Ⓐ3", "ⓣ1", "ⓣ2"):
            assert not (mark in "".join(spoken(row)) and mark in unspoken(row))
    assert [row.is_last for row in rows] == [False] * (len(rows) - 1) + [True]
    check_as_served(chat, conversation)


def test_family_expectations_cover_every_family_and_shape():
    assert set(EXPECTED) == set(FAMILIES)
    for name, rows in EXPECTED.items():
        assert set(rows) == set(SHAPES), name
        assert sum(isinstance(trained, list) for trained in rows.values()) >= 4, name


def test_family_template_markers_change_nothing():
    assert "generation" in family("chatml_marked").source
    assert "generation" not in family("chatml").source.replace("add_generation_prompt", "")
    for conversation in (SHAPES["plain"], SHAPES["system"], SHAPES["spaces"]):
        assert family("chatml_marked").rows(conversation) == family("chatml").rows(conversation)


# Typed control tokens

PLACES: dict[str, dict[str, Any]] = {
    "user": talk(user("Q1 plain!"), assistant("Ⓐ1 Hi."), user("plain"), assistant("Ⓐ2 So.")),
    "system": talk(system("Be plain"), user("Q1"), assistant("Ⓐ1 Hi.")),
    "history": talk(user("Q1"), assistant("Ⓐ1 plain Hi."), user("Q2"), assistant("Ⓐ2 So.")),
    "answer": talk(user("Q1"), assistant("Ⓐ1 Hi."), user("Q2"), assistant("plain Ⓐ2 plain")),
    "thinking": talk(user("Q1"), assistant("Ⓐ1 Hi.", "plain ⓣ1"), user("Q2"), assistant("Ⓐ2 So.", "ⓣ2 plain")),
    "result": talk(user("1+2?"), CALLED, result("③ plain"), assistant("Ⓐ2 Three."), tools=[tool()]),
    "arguments": talk(
        user("1+2?"),
        assistant("", tool_calls=[call(a=1, b="plain")]),
        result("③"),
        assistant("Ⓐ2 Three."),
        tools=[tool()],
    ),
    "tool": talk(user("1+2?"), assistant("Ⓐ1 Three."), tools=[tool("Adds plain.")]),
}
READ = "typed_control_tokens"
TYPED_REFUSALS = {
    ("qwen3", "history"): READ,  # </think> would end a thought that is not one
    ("deepseek_r1", "history"): READ,
    ("gpt_oss", "history"): "template_error: content with channels",
    ("smollm3", "tool"): READ,  # tools written as Python writes them: what breaks a token shows
    ("gemma2", "system"): "template_error: there is no system role",
}


def with_typed(value: Any, typed: str) -> Any:
    if isinstance(value, str):
        return value.replace("plain", typed)
    if isinstance(value, dict):
        return {key: with_typed(of, typed) for key, of in value.items()}
    return [with_typed(of, typed) for of in value] if isinstance(value, list) else value


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", FAMILIES)
def test_family_typed_control_tokens_are_text_wherever_they_stand(name: str, place: str):
    chat, tokens = family(name), control_of(name)
    typed = " ".join(tokens) + "".join(tokens)
    plain, conversation = PLACES[place], with_typed(PLACES[place], typed)
    expected, found = chat.outcome(plain), chat.outcome(conversation)
    if refusal := TYPED_REFUSALS.get((name, place)):
        assert found == refusal
        return
    if isinstance(expected, str):
        assert found == expected in ("template_drops_thinking", "template_drops_tool_calls")
        return
    assert found == with_typed(expected, typed)
    assert (found != expected) == (place in ("history", "answer", "thinking", "arguments"))
    encoded = chat.proved(conversation, chat.rows(conversation))
    ids = list(control_tokens(chat.vocabulary).values())
    wanted = chat.proved(plain, chat.rows(plain))
    assert [np.isin(row.input_ids, ids).sum() for row in encoded] == [
        np.isin(row.input_ids, ids).sum() for row in wanted
    ]
    assert [chat.vocabulary.decode(row.input_ids) for row in encoded] == [row.text for row in chat.rows(conversation)]


@pytest.mark.parametrize(("name", "read"), [("qwen3", "</think>"), ("deepseek_r1", "</think>")])
def test_family_that_reads_a_typed_token_loses_only_rows_in_which_it_is_history(name: str, read: str):
    harmless = "".join(token for token in control_of(name) if token != read)
    history, answer = PLACES["history"], PLACES["answer"]
    chat = family(name)
    assert chat.outcome(with_typed(history, read)) == READ
    assert isinstance(chat.outcome(with_typed(history, harmless)), list)
    (_, (trained,)) = chat.outcome(with_typed(answer, read))
    assert trained.endswith(f"{read} Ⓐ2 {read}{chat.vocabulary.eos_token}")


# Stop tokens


def test_stop_tokens_several_each_ends_its_kind_of_turn():
    code = talk(user("1+2?"), CALLED, result("③"), assistant("Ⓐ2 Three."), tools=[tool()], builtin_tools=["code"])
    ((called, answered),) = family("llama3").outcome(code)
    assert called == '{"name": "add", "parameters": {"a": 1, "b": "zwei"}}<|eom_id|>'
    assert answered == "Ⓐ2 Three.<|eot_id|>"
    check_as_served(family("llama3"), code)


@pytest.mark.parametrize(("name", "unknown"), [("llama3", "<|eom_id|>"), ("gpt_oss", "<|call|>")])
def test_stop_token_that_the_recipe_leaves_out_is_an_error_that_names_it(name: str, unknown: str):
    without = Chat(family(name).vocabulary, family(name).source)
    conversation = talk(user("1+2?"), CALLED, tools=[tool()], builtin_tools=["code"])
    with pytest.raises(ValueError, match=r"or add it to model\.stop_tokens") as error:
        without.rows(conversation)
    assert repr(unknown) in str(error.value)
    assert not isinstance(error.value, Rejected)


def test_stop_token_inside_of_a_turn_is_an_error_that_names_it():
    chat = family("gpt_oss")
    with_end = Chat(chat.vocabulary, chat.source, (*chat.extra_stop_tokens, "<|end|>"))
    with pytest.raises(ValueError, match=r"writes '<\|end\|>' inside of an assistant turn.*model\.stop_tokens"):
        with_end.rows(SHAPES["thinking"])


TAIL = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"


def test_stop_token_before_an_end_of_text_is_the_turns_end():
    """As Phi 3's, which writes the end token after the whole text."""
    source = "{% for m in messages %}{{ '<|start|>' ~ m.role ~ '\n' ~ m.content ~ '<|end|>\n' }}{% endfor %}" + TAIL
    source += "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    words = vocabulary(["<|start|>", "<|end|>"], eos="<|endoftext|>")
    chat = Chat(words, source, ("<|end|>",))
    assert chat.outcome(SHAPES["plain"]) == [["Ⓐ1 Hi.<|end|>", "Ⓐ2 So.<|end|>"]]
    assert chat.rows(SHAPES["plain"])[0].text.endswith("Ⓐ2 So.<|end|>")
    check_as_served(chat, SHAPES["plain"])
    # Served to the end of the text alone, a turn holds both, and no history is what was generated.
    assert Chat(words, source).outcome(SHAPES["plain"]) == [
        ["Ⓐ1 Hi.<|end|>\n<|endoftext|>"],
        ["Ⓐ2 So.<|end|>\n<|endoftext|>"],
    ]


def test_stop_token_can_be_the_header_of_the_next_turn():
    """As GLM's, whose turns end where the user or a tool begins."""
    source = """{% for m in messages %}{{ {'user': '<|user|>', 'tool': '<|tool|>'}[m.role] | default('<|assistant|>') }}
{{ m.content }}{{ m.tool_calls[0].function if m.tool_calls }}{% endfor %}"""
    source += "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    chat = Chat(vocabulary(["<|user|>", "<|tool|>", "<|assistant|>"], eos="<|user|>"), source, ("<|tool|>",))
    assert chat.outcome(SHAPES["plain"]) == [["Ⓐ1 Hi.<|user|>", "Ⓐ2 So.<|user|>"]]
    check_as_served(chat, SHAPES["plain"])
    ((called, answered, last),) = chat.outcome(SHAPES["tools"])
    assert (called[-8:], answered, last) == ("<|tool|>", "Ⓐ2 Three.<|user|>", "Ⓐ3 So.<|user|>")


def test_history_that_the_template_leaves_out_is_a_reject():
    chatml = family("chatml").source
    for role, conversation in (("tool", SHAPES["tools"]), ("user", SHAPES["plain"])):
        source = chatml.replace("in messages -%}", f"in messages if message.role != '{role}' -%}}", 1)
        chat = Chat(family("chatml").vocabulary, source)
        question, _, *others = conversation["messages"]
        assert chat.outcome(talk(question, assistant("Ⓐ1"), *others)) == "template_drops_turn"


@pytest.mark.parametrize(
    ("name", "answer", "reason"),
    [
        ("chatml", assistant("Ⓐ1 Hi.", "Hi"), "template_drops_thinking"),
        ("chatml", assistant("So it is 4, and not 5.", "So it is 4, and not 5."), "template_drops_thinking"),
        ("smollm3", {**assistant("no", "n"), "train": True}, "template_drops_thinking"),
        ("mistral", assistant("name", tool_calls=[call(a=1)]), "template_changes_content"),
        ("llama3", assistant("</", tool_calls=[call(a="</x>")]), "template_changes_content"),
        ("gpt_oss", assistant("", tool_calls=[call(a=1), call(2, a=1)]), "template_drops_tool_calls"),
    ],
)
def test_text_that_is_left_out_is_missed_where_other_words_hold_it_too(name: str, answer: dict[str, Any], reason: str):
    assert family(name).outcome(talk(user("Q1"), answer, tools=[tool()])) == reason


@pytest.mark.parametrize("name", FAMILIES)
def test_text_that_is_short_is_found_where_the_template_writes_it(name: str):
    chat = family(name)
    for text in ("a", "<", "think", "|", "/", "0"):
        ((trained,),) = chat.outcome(talk(user(text), assistant(text)))
        assert trained.endswith(f"{text}{chat.vocabulary.eos_token}")
        check_as_served(chat, talk(user(text), assistant(text)))


@pytest.mark.parametrize("name", ["thinking", "qwen3"])
def test_thinking_in_a_row_that_is_served_without_it_is_a_reject(name: str):
    """The prompt's empty block stands at an earlier turn too, which must not be taken for this one."""
    conversation = talk(user("Q1"), assistant("Ⓐ1"), user("Q2"), assistant("Ⓐ2", "ⓣ2"), enable_thinking=False)
    assert family(name).outcome(conversation) == "generation_prompt_mismatch"
