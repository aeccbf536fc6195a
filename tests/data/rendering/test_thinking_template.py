"""configs/templates/thinking.jinja: each behaviour, and each fault of SmolLM3's that must not come back."""

import ast
import datetime
import json
import re
from pathlib import Path

import pytest
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft_core.data.rendering.templates import ChatTemplate, TemplateError

SOURCE = (Path(__file__).parents[3] / "configs" / "templates" / "thinking.jinja").read_text()
TEMPLATE = ChatTemplate(SOURCE, {}, datetime.date(2024, 7, 9))
EMPTY_BLOCK = "<think>\n\n</think>\n\n"
USER = {"role": "user", "content": "Hello"}
ANSWER = {"role": "assistant", "content": "Hi."}
WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city, now.",
    "parameters": {
        "type": "object",
        "properties": {
            "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
            "city": {"type": "string", "description": "Zürich, <b>say</b>"},
            "exact": {"type": "boolean"},
            "days": {"type": "array", "items": {"type": "integer"}, "description": "Which days"},
        },
        "required": ["city"],
    },
    "return": {"type": "object"},
}
WRAPPED = {"type": "function", "function": WEATHER}
ARGUMENTS = {"city": 'Zü"rich', "exact": True, "days": [1, None], "unit": {"a": False}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}


def render(messages, *, tools=None, add_generation_prompt=False, **kwargs):
    return TEMPLATE.render(messages, tools=tools, kwargs=kwargs, add_generation_prompt=add_generation_prompt)


def bare(messages, **options):
    """A header-free rendering: only what the conversation itself brings."""
    return render(messages, header=False, **options)


def system(text):
    return {"role": "system", "content": text}


def turn(role, text):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


# Mode and flags


def test_mode_undefined_thinks():
    assert bare([USER, ANSWER]) == turn("user", "Hello") + turn("assistant", "Hi.")
    assert "Reasoning mode: /think\n" in render([USER])


def test_mode_none_reads_as_undefined():
    expected = bare([USER, ANSWER], enable_thinking=True)
    assert bare([USER, ANSWER], enable_thinking=None) == expected
    # The template itself too: at serving nobody removes the None.
    source = "{% set enable_thinking = none %}{% set header = none %}{% set tool_style = none %}" + SOURCE
    assert ChatTemplate(source, {}, TEMPLATE.date).render([USER, ANSWER]) == render([USER, ANSWER])


def test_mode_no_think_puts_the_empty_block_before_every_assistant_turn():
    text = bare([USER, ANSWER, USER, ANSWER], enable_thinking=False)
    assert text == 2 * (turn("user", "Hello") + turn("assistant", EMPTY_BLOCK + "Hi."))


@pytest.mark.parametrize(("flag", "kwarg", "empty_block"), [("/think", False, ""), ("/no_think", True, EMPTY_BLOCK)])
def test_mode_flag_overrides_the_kwarg_and_is_removed(flag, kwarg, empty_block):
    text = bare([system(f"Be brief. {flag}"), USER], enable_thinking=kwarg, add_generation_prompt=True)
    expected = turn("system", "Be brief.") + turn("user", "Hello") + "<|im_start|>assistant\n" + empty_block
    assert text == expected


@pytest.mark.parametrize(("text", "think"), [("/think x /no_think", False), ("/no_think x\n/think", True)])
def test_mode_last_flag_wins(text, think):
    prompt = bare([system(text), USER], add_generation_prompt=True)
    assert prompt.startswith(turn("system", "x"))
    assert prompt.endswith(EMPTY_BLOCK) is not think


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Read docs/thinking.md and path/think", "Read docs/thinking.md and path/think"),
        ("see /thinking, x/no_think, /think.", "see /thinking, x/no_think, /think."),
        ("/think/think", "/think/think"),
        ("/think docs/think /think", "docs/think"),
        ("/think/think /think", "/think/think"),
        ("a /think b", "a b"),
        ("a  b /think", "a  b"),
        ("a\n/think\nb", "a\nb"),
        ("a\n\n/think\n\n  b", "a\n\n\n  b"),
        ("a\n/think b", "a\nb"),
        ("a /think\n\tb", "a\n\tb"),
        ("a\r\n/think\r\nb", "a\r\nb"),
        ("a\t/think\u00a0b", "a\u00a0b"),
        ("/think /think /think a", "a"),
        ("  indented\n  text  ", "indented\n  text"),
    ],
)
def test_flag_is_removed_only_as_a_whole_word(text, kept):
    assert bare([system(text)]) == turn("system", kept)


def test_flag_in_other_messages_is_text():
    messages = [{"role": "user", "content": "/no_think"}, system("/no_think"), ANSWER]
    assert bare(messages) == turn("user", "/no_think") + turn("system", "/no_think") + turn("assistant", "Hi.")


words = st.sampled_from(["/think", "/no_think", "/system_override", "/think.", "a/think", "x", "/thinking"])
gaps = st.sampled_from([" ", "\n", "  ", "\t", "\r\n", "\u00a0", "\n\n"])


@given(st.lists(st.tuples(words, gaps), max_size=8))
def test_flag_removal_keeps_every_other_word(pairs):
    text = "".join(word + gap for word, gap in pairs)
    kept = [word for word, _ in pairs if word not in ("/think", "/no_think", "/system_override")]
    rendered = bare([system(text)])
    assert rendered.removeprefix("<|im_start|>system\n").removesuffix("<|im_end|>\n").split() == kept
    assert (rendered == "") == (not kept)


# The system turn


def test_header_shows_date_mode_and_default_instructions():
    expected = "Today: 09 July 2024\nReasoning mode: /no_think\n\nHelp the user with accurate and clear answers."
    assert render([USER], enable_thinking=False) == turn("system", expected) + turn("user", "Hello")


def test_header_knowledge_cutoff_only_when_given():
    assert "cutoff" not in render([USER])
    assert "Knowledge cutoff: June 2024\nToday: " in render([USER], knowledge_cutoff="June 2024")


def test_header_instructions_system_text_before_kwarg_before_default():
    default = "Help the user with accurate and clear answers."
    with_both = render([system("From the row."), USER], custom_instructions="From the recipe.")
    assert "From the row." in with_both
    assert "From the recipe." not in with_both and default not in with_both
    with_kwarg = render([USER], custom_instructions="From the recipe.")
    assert "From the recipe." in with_kwarg and default not in with_kwarg
    assert default in render([system("/think"), USER])


def test_header_false_adds_nothing_constant():
    assert bare([USER]) == turn("user", "Hello")
    assert bare([system(" /think "), USER], knowledge_cutoff="June 2024") == turn("user", "Hello")
    assert bare([system("Be brief."), USER]) == turn("system", "Be brief.") + turn("user", "Hello")
    assert bare([USER], tools=[WEATHER]).startswith("<|im_start|>system\nYou can call these tools")


def test_header_false_does_not_depend_on_the_date():
    later = ChatTemplate(SOURCE, {}, datetime.date(2030, 1, 1))
    assert later.render([USER], kwargs={"header": False}) == bare([USER])
    assert later.render([USER]) != render([USER])


def test_system_override_leaves_only_the_system_text():
    messages = [system("Exactly\nthis. /system_override /no_think"), USER]
    text = render(messages, tools=[WEATHER], knowledge_cutoff="June 2024", add_generation_prompt=True)
    expected = turn("system", "Exactly\nthis.") + turn("user", "Hello") + "<|im_start|>assistant\n" + EMPTY_BLOCK
    assert text == expected
    assert render([system("/system_override"), USER]) == turn("user", "Hello")


def test_system_later_messages_are_rendered_in_place():
    messages = [system("First."), USER, ANSWER, system("Later. /no_think"), USER]
    expected = [("system", "First."), ("user", "Hello"), ("assistant", "Hi.")]
    expected += [("system", "Later. /no_think"), ("user", "Hello")]
    assert bare(messages) == "".join(turn(*each) for each in expected)


# Tools


@pytest.mark.parametrize("options", [{"tools": [WEATHER, WRAPPED]}, {"xml_tools": [WRAPPED, WEATHER]}])
def test_tools_xml_are_one_json_line_each_never_a_python_repr(options):
    text = bare([USER], **options)
    lines = re.search(r"<tools>\n(.*)\n</tools>", text, re.DOTALL)[1].split("\n")
    assert [json.loads(line) for line in lines] == [WEATHER, WEATHER]
    assert "Zürich, <b>say</b>" in text and "'name'" not in text
    assert '<tool_call>\n{"name":' in text


@pytest.mark.parametrize("options", [{"tools": [WRAPPED], "tool_style": "python"}, {"python_tools": [WEATHER]}])
def test_tools_python_are_signatures_with_docstrings(options):
    text = bare([USER], **options)
    source = re.search(r"<tools>\n(.*)\n</tools>", text, re.DOTALL)[1]
    function = ast.parse(source).body[0]
    unit = "unit: Literal['c', 'f']='c', exact: bool=None, days: list[int]=None"
    assert ast.unparse(function).startswith(f"def get_weather(city: str, {unit}) -> dict:")
    docstring = ast.get_docstring(function)
    assert docstring.startswith("The weather in a city, now.\n\nArgs:\n")
    assert "city: Zürich, <b>say</b>" in docstring and "days: Which days" in docstring
    assert "<code>" in text and "<tool_call>" not in text


def test_tools_without_parameters_or_description():
    assert "\ndef ping():\n    ...\n" in bare([USER], python_tools=[{"name": "ping"}])
    assert '\n{"name": "ping"}\n' in bare([USER], tools=[{"name": "ping"}])


def test_tools_of_both_styles_are_both_shown():
    text = bare([USER], tools=[WEATHER], python_tools=[{"name": "ping"}])
    assert '{"name": "get_weather"' in text and "def ping():" in text


def test_tools_given_as_text_stay_as_they_are():
    assert '<tools>\n{"name": "f"}\n</tools>' in bare([USER], xml_tools=['{"name": "f"}'])
    assert "<tools>\ndef f(): ...\n</tools>" in bare([USER], python_tools=["def f(): ..."])


@pytest.mark.parametrize("options", [{}, {"tools": []}, {"xml_tools": None, "python_tools": []}])
def test_tools_absent_or_empty_show_nothing(options):
    assert bare([USER], **options) == turn("user", "Hello")


@pytest.mark.parametrize("options", [{"tool_style": "yaml"}, {"xml_tools": "[]"}])
def test_tools_wrong_kwarg_is_refused(options):
    with pytest.raises(TemplateError, match="expected"):
        render([USER], **options)


@pytest.mark.parametrize("call", [CALL, CALL["function"]])
def test_tool_calls_are_rendered_after_the_content(call):
    text = bare([USER, {**ANSWER, "tool_calls": [call, {"name": "ping"}]}])
    written = json.dumps({"name": "get_weather", "arguments": ARGUMENTS}, ensure_ascii=False)
    first = f"<tool_call>\n{written}\n</tool_call>"
    second = '<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>'
    assert text == turn("user", "Hello") + turn("assistant", f"Hi.\n{first}\n{second}")


def test_tool_calls_arguments_as_text_are_emitted_as_they_are():
    call = {"function": {"name": "f", "arguments": '{"x":  1}'}}
    text = bare([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert text == turn("assistant", '<tool_call>\n{"name": "f", "arguments": {"x":  1}}\n</tool_call>')


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": []}])
def test_tool_calls_without_content_render_nothing_for_it(content):
    message = {"role": "assistant", **content, "tool_calls": [{"name": "f", "arguments": {}}]}
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert bare([message]) == turn("assistant", call)
    assert bare([message], enable_thinking=False) == turn("assistant", EMPTY_BLOCK + call)
    thought = {**message, "reasoning_content": "Call f."}
    assert bare([thought]) == turn("assistant", f"<think>\nCall f.\n</think>\n\n{call}")


def test_tool_calls_in_the_python_style_are_python():
    message = {**ANSWER, "tool_calls": [CALL, {"name": "ping"}]}
    text = bare([message], python_tools=[WEATHER])
    _, answer = text.split("<|im_start|>assistant\n")
    code = re.fullmatch(r"Hi\.\n<code>\n(.*)\n</code><\|im_end\|>\n", answer, re.DOTALL)[1]
    weather, ping = ast.parse(code).body
    assert {each.arg: ast.literal_eval(each.value) for each in weather.value.keywords} == ARGUMENTS
    assert ast.unparse(ping) == "ping()"
    assert bare([message], tool_style="python") == "<|im_start|>assistant\n" + answer
    with pytest.raises(TemplateError, match="as an object"):
        bare([{**ANSWER, "tool_calls": [{"name": "f", "arguments": "{}"}]}], tool_style="python")


def test_tool_calls_without_a_name_are_refused():
    with pytest.raises(TemplateError, match="no name"):
        bare([{**ANSWER, "tool_calls": [{"arguments": {}}]}])


def test_tool_results_in_a_row_share_one_user_turn():
    result = {"role": "tool", "tool_call_id": "call_1", "content": "sun"}
    one = "<tool_response>\nsun\n</tool_response>"
    text = bare([result, result, ANSWER, result])
    assert text == turn("user", f"{one}\n{one}") + turn("assistant", "Hi.") + turn("user", one)


# Content and thinking


def test_content_parts_are_concatenated():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    for role in ("user", "assistant", "system"):
        assert bare([{"role": role, "content": parts}]) == turn(role, "Hello")
    assert "\nHello\n" in bare([{"role": "tool", "content": parts}])
    assert bare([{"role": "system", "content": [{"type": "text", "text": "/no_think"}]}, ANSWER]) == turn(
        "assistant", EMPTY_BLOCK + "Hi."
    )


@pytest.mark.parametrize(
    "content", [[{"type": "image", "image": "x.png"}], [{"type": "text"}], ["Hello"], {"text": "Hello"}, 3]
)
def test_content_that_is_no_text_is_refused(content):
    with pytest.raises(TemplateError, match=r"A user message has .*(not text|neither text)"):
        bare([{"role": "user", "content": content}])


def test_role_unknown_is_refused_by_name():
    with pytest.raises(TemplateError, match="Unknown role wizard"):
        bare([{"role": "wizard", "content": "Hello"}])


@pytest.mark.parametrize("think", [True, False])
def test_reasoning_is_rendered_in_every_turn_history_included(think):
    thought = {**ANSWER, "reasoning_content": "A greeting.\n"}
    text = bare([USER, thought, USER, thought], enable_thinking=think)
    assert text == 2 * (turn("user", "Hello") + turn("assistant", "<think>\nA greeting.\n\n</think>\n\nHi."))


@pytest.mark.parametrize("reasoning", [None, "", " \n"])
def test_reasoning_empty_is_none(reasoning):
    message = {**ANSWER, "reasoning_content": reasoning}
    assert bare([message]) == turn("assistant", "Hi.")
    assert bare([message], enable_thinking=False) == turn("assistant", EMPTY_BLOCK + "Hi.")


@pytest.mark.parametrize("content", [EMPTY_BLOCK + "Hi.", "<think>\nA\n</think>\n\nHi.", "\n<think></think>Hi."])
@pytest.mark.parametrize("think", [True, False])
def test_empty_block_is_never_doubled(content, think):
    assert bare([{"role": "assistant", "content": content}], enable_thinking=think) == turn("assistant", content)


def test_generation_prompt_ends_where_the_model_starts():
    user = turn("user", "Hello")
    assert bare([USER], add_generation_prompt=True) == user + "<|im_start|>assistant\n"
    prompt = bare([USER], add_generation_prompt=True, enable_thinking=False)
    assert prompt == user + "<|im_start|>assistant\n" + EMPTY_BLOCK


@pytest.mark.parametrize(
    "content",
    ["{{ 7 * 7 }} {% raise %} {# x #}", "日本語 🦜 é\u2028", "<|im_end|>\n<|im_start|>system\n", " \n"],
)
def test_content_is_data_kept_to_the_letter(content):
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    assert bare(messages) == turn("user", content) + turn("assistant", content)


# Prefixes

texts = st.one_of(
    st.sampled_from(["", "Hi.", "{{ x }}", "日本 🦜", "<|im_end|>", " a\n\nb ", "docs/thinking.md", "<b>"]),
    st.text(max_size=8),
)
contents = st.one_of(texts, st.none(), texts.map(lambda text: [{"type": "text", "text": text}] * 2))
calls = st.lists(st.sampled_from([CALL, {"name": "ping"}, {"name": "f", "arguments": {"x": 1.5}}]), max_size=2)


@st.composite
def consistent_rows(draw):
    """A conversation with its options; a row without thinking has no reasoning and no think block."""
    think = draw(st.booleans())
    messages = []
    if draw(st.booleans()):
        flag = draw(st.sampled_from(["/think", "/no_think"])) if draw(st.booleans()) else ""
        override = draw(st.sampled_from(["", " /system_override"]))
        messages.append(system(f"{draw(texts)} {flag}{override}"))
        think = flag == "/think" if flag else think
    for role in draw(st.lists(st.sampled_from(["user", "assistant", "tool", "system"]), max_size=6)):
        message = {"role": role, "content": draw(contents)}
        if role == "assistant":
            message["tool_calls"] = draw(st.one_of(st.none(), calls))
            if think:
                message["reasoning_content"] = draw(st.one_of(st.none(), texts))
        messages.append(message)
    kwargs = {"enable_thinking": think, "header": draw(st.booleans())}
    kwargs["tool_style"] = draw(st.sampled_from(["xml", "python", None]))
    tools = draw(st.sampled_from([None, [], [WRAPPED]]))
    return messages, tools, kwargs


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(consistent_rows())
def test_prefix_prompt_then_turn_then_whole(row):
    messages, tools, kwargs = row
    whole = render(messages, tools=tools, **kwargs)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = render(messages[:index], tools=tools, add_generation_prompt=True, **kwargs)
            answered = render(messages[: index + 1], tools=tools, **kwargs)
            assert answered.startswith(prompt) and answered.endswith("<|im_end|>\n")
            assert whole.startswith(answered)


# In plain transformers, as the saved checkpoint will use it


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes as tokens, with SmolLM2's control tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({character: i for i, character in enumerate(alphabet)}, [])
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    control = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, chat_template=SOURCE, **control)


def trained_spans(tokenizer, messages, **kwargs):
    """The texts of the runs of ones in transformers' assistant mask."""
    encoded = tokenizer.apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True, header=False, **kwargs
    )
    spans, previous = [], 0
    for token, trained in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        if trained and not previous:
            spans.append([])
        if trained:
            spans[-1].append(token)
        previous = trained
    return [tokenizer.decode(span) for span in spans]


def test_generation_tag_marks_what_the_model_writes(tokenizer):
    thought = {**ANSWER, "reasoning_content": "A greeting."}
    call = {**ANSWER, "content": None, "tool_calls": [{"name": "f"}]}
    spans = trained_spans(tokenizer, [system("x"), USER, thought, USER, ANSWER, call])
    written = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>'
    assert spans == ["<think>\nA greeting.\n</think>\n\nHi.<|im_end|>", "Hi.<|im_end|>", written]


@pytest.mark.parametrize("content", ["Hi.", EMPTY_BLOCK + "Hi."])
def test_generation_tag_starts_after_the_empty_block(tokenizer, content):
    messages = [USER, {"role": "assistant", "content": content}, USER, ANSWER]
    assert trained_spans(tokenizer, messages, enable_thinking=False) == ["Hi.<|im_end|>"] * 2


def test_render_equals_transformers(tokenizer):
    messages = [system("Be brief. /no_think"), USER, {**ANSWER, "tool_calls": [CALL]}, system("Later."), USER]
    for kwargs in ({}, {"header": False}, {"tool_style": "python"}, {"knowledge_cutoff": "June 2024"}):
        template = ChatTemplate(SOURCE, {}, datetime.date.today())
        expected = tokenizer.apply_chat_template(
            messages, tools=[WRAPPED], tokenize=False, add_generation_prompt=True, **kwargs
        )
        found = template.render(messages, tools=[WRAPPED], kwargs=kwargs, add_generation_prompt=True)
        assert found == expected
