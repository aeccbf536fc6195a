"""Rendering: what is trained is what the assistant said and its stop token, in a row as the model is served."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft_core.data.rendering.spans import RenderedRow, Renderer
from sft_core.data.rendering.templates import TemplateError
from sft_core.data.sources.formats.conversations import canonical
from sft_core.data.sources.rejects import Rejected
from sft_core.data.tokenizer.encoded import encode_rows
from sft_core.data.tokenizer.tokenizer import PieceEncoder
from steps.render import RENDERED
from tests.data.rows import columns

STOP = "<|im_end|>"
EMPTY_BLOCK = "<think>\n\n</think>\n\n"
CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
# As Qwen3's: a turn before the last user turn loses its thinking.
REWRITES = """{%- set last = namespace(user=-1) -%}
{%- for message in messages if message.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endfor -%}
{%- set seen = namespace(users=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set seen.users = seen.users + 1 -%}{%- endif -%}
{{- '<|im_start|>' ~ message.role ~ '\n' -}}
{%- if message.role == 'assistant' and message.reasoning_content and seen.users >= last.user -%}
{{- '<think>\n' ~ message.reasoning_content ~ '\n</think>\n\n' -}}
{%- endif -%}
{{- message.content ~ '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""


def user(text: str = "Hello") -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str = "Hi.", thinking: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "reasoning_content": thinking, **more}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def tool_result(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


def talk(*messages: dict[str, Any], kwargs: dict[str, Any] | None = None, **row: Any) -> dict[str, Any]:
    return canonical({"messages": list(messages), "chat_template_kwargs": kwargs, **row})


def spoken(row: RenderedRow) -> list[str]:
    return [row.text[start:end] for start, end in row.spans]


def unspoken(row: RenderedRow) -> str:
    """The text outside the spans, which must be in order and apart."""
    borders = [0, *(offset for span in row.spans for offset in span), len(row.text)]
    assert borders == sorted(borders)
    return "".join(row.text[start:end] for start, end in zip(borders[::2], borders[1::2], strict=True))


def typed(row: RenderedRow) -> list[str]:
    return [row.text[start:end] for start, end in row.literals]


@pytest.fixture(scope="module")
def render(renderer: Callable, quickstart: Any) -> Callable[..., list[RenderedRow]]:
    """Renders one conversation, by the thinking template unless told otherwise."""

    def rows(conversation: dict[str, Any], **options: Any) -> list[RenderedRow]:
        return renderer(quickstart, **options).render(conversation)

    return rows


# Spans


def test_spans_multi_turn_with_a_system_text_are_the_answers(render):
    conversation = talk(system("Be kind."), user(), assistant(), user("Bye"), assistant("Ciao 👋🏽"))
    (row,) = render(conversation)
    assert spoken(row) == [f"Hi.{STOP}", f"Ciao 👋🏽{STOP}"]
    assert unspoken(row) == (
        f"<|im_start|>system\nBe kind.{STOP}\n<|im_start|>user\nHello{STOP}\n<|im_start|>assistant\n\n"
        f"<|im_start|>user\nBye{STOP}\n<|im_start|>assistant\n\n"
    )
    assert row.literals == []
    assert row.is_last


def test_spans_thinking_is_trained_with_its_answer(render):
    (row,) = render(talk(user(), assistant("4", "2+2"), user("Why?"), assistant("So.")))
    assert spoken(row) == [f"<think>\n2+2\n</think>\n\n4{STOP}", f"So.{STOP}"]


def test_spans_no_think_start_after_the_empty_block(render):
    for conversation in (
        talk(user(), assistant("4"), kwargs={"enable_thinking": False}),
        talk(system("/no_think"), user(), assistant(f"{EMPTY_BLOCK}4")),
    ):
        (row,) = render(conversation)
        assert spoken(row) == [f"4{STOP}"]
        assert row.text[: row.spans[0][0]].endswith(f"<|im_start|>assistant\n{EMPTY_BLOCK}")


def test_spans_tool_calls_are_trained_and_tool_results_are_not(render):
    call = {"name": "add", "arguments": {"a": 1, "é": "<ü>"}}
    tool = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}
    turns = [user("1+2"), assistant("", "I add.", tool_calls=[call]), tool_result("3"), assistant("It is 3.")]
    (row,) = render(talk(*turns, tools=[tool]))
    called = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "é": "<ü>"}}\n</tool_call>'
    assert spoken(row) == [f"<think>\nI add.\n</think>\n\n{called}{STOP}", f"It is 3.{STOP}"]
    assert "<tool_response>\n3\n</tool_response>" in unspoken(row)
    assert "Adds." in unspoken(row)


def test_spans_text_that_follows_the_last_answer_is_cut(render):
    (row,) = render(talk(user(), assistant(), user("never answered")))
    assert "never answered" not in row.text
    assert spoken(row) == [f"Hi.{STOP}"]


def test_spans_two_assistant_turns_in_a_row_are_two(render):
    (row,) = render(talk(user(), assistant("One."), assistant("Two.")))
    assert spoken(row) == [f"One.{STOP}", f"Two.{STOP}"]


def test_spans_of_the_same_answer_twice_are_both_there(render):
    (row,) = render(talk(user("Hi."), assistant("Hi."), user("Hi."), assistant("Hi.")))
    assert spoken(row) == [f"Hi.{STOP}"] * 2
    assert row.spans[0][1] < row.spans[1][0]


def test_template_without_generation_markers_gives_the_same_spans(render):
    assert "{% generation" not in CHATML
    conversation = talk(system("s"), user(), assistant(), user("Bye"), assistant("Ciao"))
    assert render(conversation, template=CHATML) == render(conversation)


# Control tokens that somebody typed


def test_typed_control_tokens_stay_text_and_end_no_turn(render):
    question, answer = f"a{STOP}\n<|im_start|>assistant\nb", f"say {STOP} and <|endoftext|>"
    (row,) = render(talk(user(question), assistant(answer), tool_result(STOP), assistant("Hi.", STOP)))
    assert spoken(row) == [f"{answer}{STOP}", f"<think>\n{STOP}\n</think>\n\nHi.{STOP}"]
    assert typed(row) == [STOP, "<|im_start|>", STOP, "<|endoftext|>", STOP, STOP]
    assert question in unspoken(row)


def test_typed_control_token_at_the_end_of_an_answer_is_not_its_stop(render):
    (row,) = render(talk(user(), assistant(f"Hi.{STOP}")))
    assert spoken(row) == [f"Hi.{STOP}{STOP}"]
    assert typed(row) == [STOP]
    assert row.literals[0][1] == row.spans[0][1] - len(STOP)


def test_typed_control_tokens_in_tools_and_arguments_stay_text_keys_too(render):
    tool = {"name": STOP, "description": STOP, "parameters": {"properties": {STOP: {"type": "string"}}}}
    call = {"name": "add", "arguments": {STOP: STOP}}
    (row,) = render(talk(user(), assistant("", tool_calls=[call]), tools=[tool]))
    assert typed(row) == [STOP] * 5
    assert row.text.count(STOP) == 5 + 3, "three are the template's: of the system, user and assistant turn"


def test_typed_noncharacters_survive(render):
    text = "".join(map(chr, range(0xFDD0, 0xFDEF))) + STOP
    (row,) = render(talk(user(text), assistant(text)))
    assert spoken(row) == [f"{text}{STOP}"]
    assert len(row.literals) == 2
    with pytest.raises(Rejected) as fault:
        render(talk(user("".join(map(chr, range(0xFDD0, 0xFDF0)))), assistant()))
    assert fault.value.reason == "reserved_characters"


# A template that rewrites history


def test_template_that_rewrites_history_every_turn_is_trained_once_in_a_row_as_served(renderer, quickstart):
    conversation = talk(
        user("a"),
        assistant("A", "think a"),
        user("b"),
        assistant("B"),
        user("c"),
        assistant("C", "think c"),
        tool_result("t"),
        assistant("D", "think d"),
    )
    one = renderer(quickstart, template=REWRITES)
    rows = one.render(conversation)
    assert [spoken(row) for row in rows] == [
        [f"<think>\nthink a\n</think>\n\nA{STOP}"],
        [f"B{STOP}", f"<think>\nthink c\n</think>\n\nC{STOP}", f"<think>\nthink d\n</think>\n\nD{STOP}"],
    ]
    assert [row.is_last for row in rows] == [False, True]
    messages = conversation["messages"]
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    served = [one.template.render(messages[:turn], add_generation_prompt=True) for turn in turns]
    assert [row.text[:start] for row in rows for start, _ in row.spans] == served


def test_template_that_rewrites_history_without_thinking_gives_one_row(render):
    (row,) = render(talk(user(), assistant("A"), user(), assistant("B")), template=REWRITES)
    assert spoken(row) == [f"A{STOP}", f"B{STOP}"]


# Refusals


def test_eos_mismatch_is_an_error_that_says_what_to_set(renderer, load, quickstart):
    other = load(quickstart.name_or_path, eos_token="<|endoftext|>")
    with pytest.raises(ValueError, match=r"set model\.eos_token: '<\|im_end\|>'") as error:
        renderer(other).render(talk(user(), assistant()))
    assert not isinstance(error.value, Rejected | TemplateError)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>model\n'"), "generation_prompt_mismatch"),
        (CHATML.replace("<|im_end|>", ""), "no_stop_token"),
        (CHATML.replace("'<|im_end|>\n'", "'<|im_end|> over'"), "no_stop_token"),
        (CHATML, "template_drops_thinking"),
    ],
)
def test_template_that_cannot_be_trained_is_a_reject(render, template: str, reason: str):
    with pytest.raises(Rejected) as fault:
        render(talk(user(), assistant("4", "2+2")), template=template)
    assert fault.value.reason == reason
    assert "messages[1]" in str(fault.value)


def test_thinking_in_a_no_think_row_is_a_reject(render):
    with pytest.raises(Rejected) as fault:
        render(talk(user(), assistant("4", "2+2"), kwargs={"enable_thinking": False}))
    assert fault.value.reason == "generation_prompt_mismatch"


# Loss scopes


@pytest.mark.parametrize("options", [{}, {"template": REWRITES}], ids=["thinking", "rewrites"])
def test_loss_scope_completion_trains_the_last_turn_alone(render, options: dict[str, str]):
    conversation = talk(user(), assistant("A", "a"), user("b"), assistant("B", "b"), user("c"))
    (row,) = render(conversation, loss_scope="completion", **options)
    assert spoken(row) == [f"<think>\nb\n</think>\n\nB{STOP}"]
    assert row.is_last


def test_loss_scope_all_trains_everything_and_marks_typed_tokens(render):
    (row,) = render(talk(user(STOP), assistant("4"), user("last")), loss_scope="all")
    assert row.spans == [(0, len(row.text))]
    assert row.text.endswith(f"last{STOP}\n")
    assert typed(row) == [STOP]


def test_raw_text_is_trained_whole_with_an_end_token(render):
    (row,) = render({"text": f"Once {STOP} upon"}, loss_scope="all")
    assert row.text == f"Once {STOP} upon{STOP}"
    assert row.spans == [(0, len(row.text))]
    assert row.literals == [(5, 5 + len(STOP))]
    with pytest.raises(Rejected, match="loss_scope: all") as fault:
        render({"text": "Once"})
    assert fault.value.reason == "no_assistant_turn"


# The stage


def test_stage_rows_spans_answers_and_counts(write_rows, pinned, ensure, tmp_path: Path):
    (tmp_path / "rewrites.jinja").write_text(REWRITES)
    turns = [user("a"), assistant("A", "a"), user("b"), assistant("B", "b")]
    path = write_rows("a.jsonl", [{"messages": turns, "answer": "B"}, {"messages": [user(STOP), assistant("C")]}])
    recipe = pinned({"name": "s", "path": str(path)}, chat_template={"template": str(tmp_path / "rewrites.jinja")})
    folder, manifest = ensure(RENDERED, recipe, source="s")
    rows = pq.read_table(folder / "shard-00000" / "rendered.parquet").to_pylist()
    counts = {"conversations": 2, "rows": 3, "conversations_split": 1, "control_tokens_kept_as_text": 1, "rejected": {}}
    assert manifest["counts"] == counts
    assert [row["answer"] for row in rows] == [None, "B", None]
    assert rows[0]["row_id"] == rows[1]["row_id"] != rows[2]["row_id"]
    assert rows[0]["prompt_hash"] == rows[1]["prompt_hash"]
    trained = [row["text"][slice(*row["spans"])] for row in rows]
    assert trained == [f"<think>\na\n</think>\n\nA{STOP}", f"<think>\nb\n</think>\n\nB{STOP}", f"C{STOP}"]
    assert [row["text"][slice(*row["literals"])] for row in rows if row["literals"]] == [STOP]


def test_stage_rows_that_the_template_refuses_are_counted_and_can_be_looked_at(
    write_rows, pinned, ensure, tmp_path: Path
):
    refuses = "{% if messages and messages[0].content == 'bad' %}{{ raise_exception('no bad words') }}{% endif %}"
    (tmp_path / "refuses.jinja").write_text(refuses + CHATML)
    said = (("bad", None), ("a", "hm"), ("b", None))
    rows = [{"messages": [user(question), assistant("4", thinking)]} for question, thinking in said]
    source = {"name": "s", "path": str(write_rows("a.jsonl", rows))}
    sections = {"chat_template": {"template": str(tmp_path / "refuses.jinja")}}
    folder, manifest = ensure(RENDERED, pinned(source, mixture={"max_rejected_share": 0.7}, **sections), source="s")
    counts = manifest["counts"]
    assert counts["rejected"] == {"template_drops_thinking": 1, "template_error": 1}
    assert (counts["conversations"], counts["rows"]) == (3, 1)
    found = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["reason"], reject["detail"][:12]) for reject in found] == [
        ("template_error", "no bad words"),
        ("template_drops_thinking", "messages[1]:"),
    ]
    assert len({reject["where"] for reject in found}) == 2
    with pytest.raises(ValueError, match=r"2 of 3 rows are rejected .*\n.*template_error: no bad words"):
        ensure(RENDERED, pinned(source, mixture={"max_rejected_share": 0.5}, **sections), source="s")


def test_stage_without_any_template_says_what_to_set(write_rows, pinned, ensure):
    path = write_rows("a.jsonl", [{"messages": [user(), assistant()]}])
    with pytest.raises(ValueError, match=r"has no chat template of its own; set chat_template\.template to thinking"):
        ensure(RENDERED, pinned({"name": "s", "path": str(path)}, chat_template={}), source="s")


# Properties

PARTS = ["a", "Hi", " ", "\n", "\n\n", "é", "👋🏽", "\u202e", STOP, "<|im_start|>", "<think>", "assistant\n", "<|im_"]
texts = st.lists(st.sampled_from(PARTS), max_size=6).map("".join)
# In no_think mode an answer that starts with <think> is a reject.
beginnings = texts.filter(lambda text: not text.strip().startswith("<think>"))


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    """A conversation in which each answer, and nothing else, holds a mark."""
    kwargs = draw(st.sampled_from([{}, {"enable_thinking": False}, {"enable_thinking": True}]))
    thinks = kwargs.get("enable_thinking", True)
    messages = [system(draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        results = [tool_result(draw(texts))] if draw(st.booleans()) else []
        thinking = draw(texts) if thinks and draw(st.booleans()) else None
        messages += [user(draw(texts)), *results, assistant(f"{draw(beginnings)}Ⓐ{draw(texts)}", thinking)]
    return talk(*messages, kwargs=kwargs)


@pytest.fixture(scope="module")
def rendering(renderer: Callable, quickstart: Any) -> tuple[Renderer, PieceEncoder]:
    return renderer(quickstart), PieceEncoder(quickstart)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(conversation=conversations())
def test_any_conversation_the_mask_is_its_answers_and_the_ids_are_its_text(conversation, rendering, quickstart):
    renderer, encoder = rendering
    (row,) = renderer.render(conversation)

    answers = [message for message in conversation["messages"] if message["role"] == "assistant"]
    assert len(row.spans) == len(answers) > 0
    assert "Ⓐ" not in unspoken(row)
    for said, answer in zip(spoken(row), answers, strict=True):
        reasoning = answer.get("reasoning_content", "")
        thinking = f"<think>\n{reasoning}\n</think>\n\n" if reasoning else ""
        assert said == f"{thinking}{answer['content']}{STOP}"

    (encoded,) = encode_rows(encoder, columns(row))
    assert quickstart.decode(encoded.input_ids) == row.text
    borders = np.flatnonzero(np.diff(encoded.trained.astype(int), prepend=0, append=0)).reshape(-1, 2)
    runs = [encoded.input_ids[start:end] for start, end in borders]
    assert [quickstart.decode(run) for run in runs] == spoken(row)
    stop = quickstart.convert_tokens_to_ids(STOP)
    assert all((run == stop).sum() == 1 and run[-1] == stop for run in runs)
    assert (encoded.input_ids == stop).sum() == row.text.count(STOP) - typed(row).count(STOP)
