"""Every text template that TRL ships: rows that pass the mask proof, or a reason; and its markers against our spans."""

import functools
import re
from importlib import resources
from typing import Any

import numpy as np
import pytest

from tests.data.families import Chat, assistant, spoken, system, talk, tool, user, vocabulary
from tests.data.rendering.test_template_families import NO_THINKING, NO_TOOLS, SHAPES, check_as_served

TEMPLATES = {
    path.name.removesuffix(".jinja"): path.read_text()
    for path in sorted(resources.files("trl").joinpath("chat_templates").iterdir(), key=lambda path: path.name)
    if path.name.endswith(".jinja")
}
# What a vocabulary of such a template has as tokens of their own.
CONTROL = re.compile(
    r"<\|[\w▁\"]+\|>|<｜[^｜]+｜>|<\|[\w\"]+>|<[\w\"]+\|>|</?(?:think|tool_call|tool_response|start_of_turn|end_of_turn)>"
    r"|\[gMASK\]|<sop>"
)
# A template knows its end token as a variable at most. What the model's own generation config has, by the longest name
# that the template's begins with; then further stop tokens.
STOPS = {
    "": ("<|im_end|>",),
    "cohere": ("<|END_OF_TURN_TOKEN|>",),
    "deepseek": ("<｜end▁of▁sentence｜>",),
    "diffusion_gemma": ("<turn|>", "<|tool_response>"),
    "gemma": ("<end_of_turn>",),
    "gemma4": ("<turn|>", "<|tool_response>"),
    "glm4moe": ("<|user|>", "<|observation|>"),
    "gptoss": ("<|return|>", "<|call|>"),
    "llama3": ("<|eot_id|>",),
    "muse_glimmer": ("<|eot|>",),
    "phi3": ("<|end|>",),
}


@functools.cache
def chat_of(name: str) -> Chat:
    source = TEMPLATES[name]
    eos, *more = STOPS[max(filter(name.startswith, STOPS), key=len)]
    extra = tuple(token for token in more if token in source)
    return Chat(vocabulary(CONTROL.findall(source), eos=eos, bos="<s>"), source, extra)


def as_parts(conversation: dict[str, Any]) -> dict[str, Any]:
    parts = [{**of, "content": [{"type": "text", "text": of["content"]}]} for of in conversation["messages"]]
    return {**conversation, "messages": parts}


def takes_text(name: str) -> bool:
    """Whether the template renders messages that are strings; some know only lists of text and image parts."""
    try:
        return "Q1" in chat_of(name).served_prompt(SHAPES["plain"], 1, tokenize=False)
    except Exception:  # whatever a template raises on an unexpected kind of content
        return False


TEXT = [name for name in TEMPLATES if takes_text(name)]
LISTS_ONLY = sorted(set(TEMPLATES) - set(TEXT))


def test_templates_that_take_no_text_are_those_of_images():
    assert len(TEXT) > 50
    assert len(LISTS_ONLY) <= 6
    for name in LISTS_ONLY:
        assert "'image'" in TEMPLATES[name]
        assert "Q1" in chat_of(name).served_prompt(as_parts(SHAPES["plain"]), 1, tokenize=False)


# Templates by the longest beginning of their names, with the shapes that they refuse. `tools` stands for calls.
ALTERNATES = "template_error: Conversation roles must alternate user/assistant/user/assistant/..."
ONE_CALL = {"two calls": "template_error: This model only supports single tool-calls at once!"}
WORDS_LOST = {"call with words": "template_changes_content"}
NO_SYSTEM = {"system": "template_error: System role not supported"}
STRINGS = 'template_error: TypeError: can only concatenate str (not "dict") to str'
REFUSED: dict[str, dict[str, str]] = {
    "cohere": NO_THINKING | NO_TOOLS | {"two users": ALTERNATES},
    "deepseek_r1_distill": NO_TOOLS | {"tools and thinking": "template_drops_tool_calls"},
    "deepseekv3": dict.fromkeys(("tools", "call with words", "two calls", "tools and thinking"), STRINGS),
    "deepseekv3_training": {"tools and thinking": "template_drops_thinking"},  # none is served after a result
    "gemma": NO_THINKING | NO_TOOLS | NO_SYSTEM | {"two users": ALTERNATES},
    "gemma3": NO_THINKING | NO_TOOLS | {"two users": ALTERNATES},
    "gemma4": NO_THINKING,
    # The words of a turn that calls stand before its call in history and after it when they are written.
    "gemma4_v5": {"call with words": "generation_prompt_mismatch"},
    "diffusion_gemma": {"call with words": "generation_prompt_mismatch"},
    "gptoss": {"two calls": "template_drops_tool_calls"},
    "lfm2": NO_THINKING | NO_TOOLS,
    "lfm2_2_5": {},
    "lfm2_v2": NO_THINKING,
    "llama3": NO_THINKING | NO_TOOLS,
    "llama3_1": NO_THINKING | ONE_CALL | WORDS_LOST,
    "llama3_2": NO_THINKING | ONE_CALL | WORDS_LOST,
    "muse_glimmer": WORDS_LOST,
    "phi3": NO_THINKING | NO_TOOLS,
    "qwen2_5": NO_THINKING,
    "qwen2_5_vl": NO_THINKING | NO_TOOLS,
    # Served with an empty think block: a row that thinks says enable_thinking.
    "qwen3_5_nothink": dict.fromkeys(NO_THINKING, "generation_prompt_mismatch"),
    "qwen3_instruct_2507": NO_THINKING,
    "qwen3_vl": NO_THINKING,
    "": {},
}


@pytest.mark.parametrize("name", TEXT)
def test_template_rows_pass_the_proof_or_have_a_reason(name: str):
    chat, refused = chat_of(name), REFUSED[max(filter(name.startswith, REFUSED), key=len)]
    for shape, conversation in SHAPES.items():
        outcome = chat.outcome(conversation)
        expected = refused.get(shape)
        if expected is not None:
            assert outcome == expected, shape
            continue
        assert isinstance(outcome, list), (shape, outcome)
        told = "".join(text for row in outcome for text in row)
        for mark in ("Ⓐ1", "Ⓐ2", "Ⓐ3", "ⓣ1", "ⓣ2"):
            is_said = any(mark in f"{of}" for of in conversation["messages"])
            assert told.count(mark) == is_said, (shape, mark)
        check_as_served(chat, conversation)


def test_refusals_name_templates_that_are_there_and_the_plain_shape_is_never_refused():
    for beginning, shapes in REFUSED.items():
        assert any(name.startswith(beginning) for name in TEXT)
        assert set(shapes) <= set(SHAPES) - {"plain", "no_think", "unicode", "spaces"}


# Templates whose turns do not end, begin or stay as they are rendered

CALL = "\n<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>b</arg_key>\n<arg_value>zwei"
EXACT = {
    ("glm4moe", "plain"): [["\n<think></think>\nⒶ1 Hi.<|user|>", "\n<think></think>\nⒶ2 So.<|user|>"]],
    ("glm4moe", "thinking"): [["\n<think>ⓣ1</think>\nⒶ1 Hi.<|user|>"], ["\n<think>ⓣ2</think>\nⒶ2 So.<|user|>"]],
    ("glm4moe", "tools"): [
        [
            f"\n<think></think>{CALL}</arg_value>\n</tool_call><|observation|>",
            "\n<think></think>\nⒶ2 Three.<|user|>",
            "\n<think></think>\nⒶ3 So.<|user|>",
        ]
    ],
    ("phi3", "plain"): [["Ⓐ1 Hi.<|end|>", "Ⓐ2 So.<|end|>"]],
    # Served with an open think block, which a turn that does not think closes at once.
    ("nemotron_3_nano", "plain"): [["</think>Ⓐ1 Hi.<|im_end|>"], ["</think>Ⓐ2 So.<|im_end|>"]],
    ("nemotron_3_nano", "thinking"): [["ⓣ1\n</think>\nⒶ1 Hi.<|im_end|>"], ["ⓣ2\n</think>\nⒶ2 So.<|im_end|>"]],
    ("nemotron_3_nano", "no_think"): [["Ⓐ1 Hi.<|im_end|>", "Ⓐ2 So.<|im_end|>"]],
    ("qwen3_5_think", "plain"): [["\n</think>\n\nⒶ1 Hi.<|im_end|>"], ["\n</think>\n\nⒶ2 So.<|im_end|>"]],
    ("deepseek_r1_distill", "plain"): [
        ["\n</think>\n\nⒶ1 Hi.<｜end▁of▁sentence｜>"],
        ["\n</think>\n\nⒶ2 So.<｜end▁of▁sentence｜>"],
    ],
    # Of the thoughts before an answer the one at its call is served until the answer stands.
    ("gptoss", "tools and thinking"): [
        [
            "<|channel|>analysis<|message|>ⓣ1<|end|><|start|>assistant to=functions.add<|channel|>commentary json"
            '<|message|>{"a": 1, "b": "zwei"}<|call|>',
            "<|channel|>analysis<|message|>ⓣ2<|end|><|start|>assistant<|channel|>final<|message|>Ⓐ2 Three.<|return|>",
        ],
        ["<|channel|>final<|message|>Ⓐ3 So.<|return|>"],
    ],
}


@pytest.mark.parametrize(("name", "shape"), EXACT)
def test_template_trains_exactly(name: str, shape: str):
    assert chat_of(name).outcome(SHAPES[shape]) == EXACT[name, shape]


# Markers: what a mask made of {% generation %} trains besides our spans, before and after

MARKED = [name for name in TEXT if re.search(r"{%-? generation", TEMPLATES[name])]
ONE = {
    "plain": talk(system("Be kind."), user("Q1"), assistant("Ⓐ1 Hi.")),
    "thinking": talk(user("Q1"), assistant("Ⓐ1 Hi.", "ⓣ1")),
    "tools": talk(*SHAPES["tools"]["messages"][:2], tools=[tool()]),
    "no_think": talk(user("Q1"), assistant("Ⓐ1 Hi."), enable_thinking=False),
}
EMPTY = "<think>\n\n</think>\n\n"
NEWLINE = ("", "\n")  # the newline after the stop token, which no model writes
# By the longest beginning of a name, and the shape where it matters.
BESIDES: dict[str, dict[str, tuple[str, str]]] = {
    "cohere": {"": ("", "")},
    "diffusion_gemma": {"": NEWLINE},
    "gemma": {"": NEWLINE},
    "glm4moe": {"": ("", ""), "no_think": ("\n<think></think>", "")},  # that block is in the prompt
    "gptoss": {"": ("<|start|>assistant", "")},  # the header too
    "lfm2": {"": NEWLINE},
    "llama3": {"": ("", "")},
    "muse_glimmer": {"": ("<|start|>assistant", "")},
    "nemotron": {"thinking": ("<think>\n", "\n"), "no_think": ("<think></think>", "\n")},
    "phi3": {"": ("", "\n<|end|>")},  # the newline and the end of the text
    "qwen2_5": {"": ("\n", "\n")},  # the newline of the header too
    "qwen2_5_vl": {"": NEWLINE},
    "qwen3": {"": NEWLINE, "no_think": (EMPTY, "\n")},
    "qwen3_5_nothink": {"": (EMPTY, "\n")},
    "qwen3_5_think": {"": ("<think>\n", "\n"), "no_think": (EMPTY, "\n")},
    "qwen3_6": {"": ("<think>\n", "\n"), "no_think": (EMPTY, "\n")},
    "qwen3_8": {"": ("<think>\n", "\n"), "no_think": (EMPTY, "\n")},
    "qwen3_instruct_2507": {"": NEWLINE},
    "qwen3_vl": {"": NEWLINE},
}
# The rendered turn is not what a server's prompt is followed by, so neither mask is in the other.
OTHER_TEXT = {
    "deepseek": ("plain", "thinking", "tools", "no_think"),  # the think block is opened by the prompt alone
    "nemotron": ("plain", "tools"),  # the prompt opens a block where the turn has an empty one
}


def of_name(table: dict[str, Any], name: str) -> Any:
    return table[max(filter(name.startswith, table), key=len)] if any(map(name.startswith, table)) else ()


def marked_by_template(chat: Chat, conversation: dict[str, Any]) -> list[str]:
    """The texts that transformers' mask of the markers trains."""
    made = chat.vocabulary.apply_chat_template(
        conversation["messages"],
        tools=conversation.get("tools"),
        chat_template=chat.source,
        return_assistant_tokens_mask=True,
        return_dict=True,
        **conversation.get("kwargs", {}),
    )
    mask, ids = np.array(made["assistant_masks"]), np.array(made["input_ids"])
    runs = np.flatnonzero(np.diff(mask, prepend=0, append=0)).reshape(-1, 2)
    return [chat.vocabulary.decode(ids[start:end]) for start, end in runs]


@pytest.mark.parametrize("name", MARKED)
def test_markers_train_our_spans_and_what_is_listed_besides(name: str):
    chat, num_compared = chat_of(name), 0
    for shape, conversation in ONE.items():
        if isinstance(chat.outcome(conversation), str):
            continue
        (row,) = chat.rows(conversation)
        (ours,), (theirs,) = spoken(row), marked_by_template(chat, conversation)
        if shape in of_name(OTHER_TEXT, name):
            assert theirs.rstrip("\n") not in row.text
            continue
        if (name, shape) == ("diffusion_gemma_training", "tools"):
            assert ours == f"{theirs}<|tool_response>", "the markers leave out the token at which serving stops"
            continue
        table = of_name(BESIDES, name)
        before, after = table.get(shape, table.get(""))
        assert theirs == before + ours + after, shape
        assert row.text[: row.spans[0][0]].endswith(before), "what it trains more is served"
        num_compared += 1
    assert num_compared >= 2 or name.startswith("deepseek") or name == "gemma_training", num_compared


def test_markers_of_several_turns_are_our_spans_where_the_turns_share_a_row():
    num_compared = 0
    for name in MARKED:
        chat, table = chat_of(name), of_name(BESIDES, name)
        rows = chat.rows(SHAPES["plain"])
        if len(rows) > 1 or "" not in table:
            continue  # the template rewrites history: its one text is not what each turn is served
        before, after = table[""]
        expected = [before + text + after for text in spoken(rows[0])]
        if name.startswith("phi3"):
            expected[0] = expected[0].removesuffix("<|end|>")  # which ends the text
        assert marked_by_template(chat, SHAPES["plain"]) == expected, name
        num_compared += 1
    assert num_compared >= 15


def test_markers_compared_are_many():
    assert len(MARKED) > 20
    assert {name.removesuffix("_training") for name in MARKED if name.endswith("_training")} <= set(TEMPLATES)
