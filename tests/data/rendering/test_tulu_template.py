"""configs/templates/tulu.jinja: the text of Tulu's turns, what of it is trained, and what it refuses."""

import datetime
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sft_core.data.rendering.templates import ChatTemplate, TemplateError
from sft_core.data.sources.formats.conversations import canonical
from tests.data.conftest import ROOT

TULU = (ROOT / "configs" / "templates" / "tulu.jinja").read_text()
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Bye\n"},
    {"role": "assistant", "content": "See you."},
]
TEXT = "<|system|>\nBe brief.\n<|user|>\nHello\n<|assistant|>\nHi.{eos}\n<|user|>\nBye\n\n<|assistant|>\nSee you.{eos}"


def test_tulu_text_of_a_conversation_and_of_its_prompt(byte_level: PreTrainedTokenizerFast):
    for num_messages, add_prompt, expected in (
        (5, False, TEXT),
        (4, True, TEXT.removesuffix("See you.{eos}")),
        (2, True, TEXT.split("Hi.")[0]),
        (1, False, TEXT.split("<|user|>")[0]),
    ):
        expected = expected.format(eos="<|im_end|>")
        found = byte_level.apply_chat_template(
            TALK[:num_messages], chat_template=TULU, tokenize=False, add_generation_prompt=add_prompt
        )
        assert found == expected
        template = ChatTemplate(TULU, {"eos_token": "<|im_end|>"}, datetime.date(2026, 1, 1))
        assert template.render(TALK[:num_messages], add_generation_prompt=add_prompt) == expected


def test_tulu_answers_and_their_end_tokens_are_trained(byte_level: PreTrainedTokenizerFast, renderer: Callable):
    (row,) = renderer(byte_level, TULU).render(canonical({"messages": TALK}))
    assert row.text == TEXT.format(eos="<|im_end|>")
    assert [row.text[span[0] : span[1]] for span in row.spans] == ["Hi.<|im_end|>", "See you.<|im_end|>"]


@pytest.mark.parametrize(
    ("messages", "tools"),
    [
        (TALK, [{"type": "function", "function": {"name": "f"}}]),
        ([*TALK[:2], {"role": "assistant", "content": "x", "reasoning_content": "y"}], None),
        ([*TALK[:2], {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}], None),
        ([*TALK[:2], {"role": "tool", "content": "1"}], None),
    ],
    ids=["tools", "thinking", "tool call", "tool result"],
)
def test_tulu_what_it_has_no_form_for_is_refused(messages: list[dict[str, Any]], tools: list[dict] | None):
    template = ChatTemplate(TULU, {"eos_token": "</s>"}, datetime.date(2026, 1, 1))
    with pytest.raises(TemplateError, match="This template"):
        template.render(messages, tools=tools)
