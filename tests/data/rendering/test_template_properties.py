"""Any conversation by any family and policy: rows that pass the mask proof, or a reason. Never another exception."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft_core.data.rendering.templates import TemplateError
from sft_core.data.sources.rejects import Rejected
from tests.data.families import FAMILIES, Chat, assistant, call, control_of, family, result, spoken, talk, tool

REASONS = {
    "empty_assistant_turn",
    "generation_prompt_mismatch",
    "no_trained_turn",
    "template_changes_content",
    "template_drops_thinking",
    "template_drops_tool_calls",
    "template_drops_turn",
    "turns_chosen",
    "typed_control_tokens",
}
PARTS = [
    *("a", "Hi.", "0", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u2028", "\x00", "\u202e"),
    *("é", "e\u0301", "👋🏽", "<", "|", "}", '"', "'", "\\", "{{ x }}", "{% endif %}"),
    *("/think", "assistant\n", "<|im_", "<think>\n", "</think>\n\n", "[/INST]", "<|user|>\n"),
]
ROLES = ["user", "user", "assistant", "assistant", "assistant", "tool", "system"]
POLICIES = {
    "thinking": st.sampled_from(["keep", "drop", "only_last", "inline"]),
    "empty_thinking": st.sampled_from(["as_served", "trained", "masked"]),
    "served_prefix": st.sampled_from(["tokens", "text"]),
    "loss_scope": st.sampled_from(["assistant", "assistant", "completion", "all"]),
}


def values(texts: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    plain = st.one_of(texts, st.integers(-3, 10**20), st.booleans(), st.none(), st.floats(-9, 9), st.just([]))
    return st.one_of(
        plain, st.lists(plain, max_size=2), st.dictionaries(st.sampled_from(["c", "ü"]), plain, max_size=1)
    )


@st.composite
def turns(draw: st.DrawFn, texts: st.SearchStrategy[str], number: int, role: str, *, is_plain: bool) -> dict[str, Any]:
    """A message; an assistant's content and thinking each hold a mark of its number."""
    if role == "tool":
        return result(draw(texts), draw(st.integers(1, 2)))
    if role != "assistant":
        return {"role": role, "content": draw(texts)}
    thinking = f"{draw(texts)}ⓣ{number}{draw(texts)}".strip("\n") if not is_plain and draw(st.booleans()) else None
    calls = []
    if not is_plain and draw(st.integers(0, 2)) == 0:
        arguments = st.dictionaries(st.sampled_from(["a", "b", "é"]), values(texts), max_size=2)
        calls = [call(place, **draw(arguments)) for place in range(1, draw(st.integers(1, 2)) + 1)]
    is_silent = (thinking or calls) and draw(st.booleans())
    message = assistant("" if is_silent else f"{draw(texts)}Ⓐ{number}.{draw(texts)}", thinking)
    choice = draw(st.sampled_from([{}, {}, {}, {"train": False}, {"weight": 0.5}]))
    return message | ({"tool_calls": calls} if calls else {}) | choice


@st.composite
def conversations(draw: st.DrawFn, name: str) -> dict[str, Any]:
    texts = st.lists(st.sampled_from(PARTS + list(control_of(name))), max_size=4).map("".join)
    is_plain = draw(st.booleans())  # as every family takes it
    roles = draw(st.lists(st.sampled_from(ROLES), min_size=1, max_size=6))
    if is_plain:
        roles = ["user", "assistant"] * draw(st.integers(1, 3))
    messages = [draw(turns(texts, number, role, is_plain=is_plain)) for number, role in enumerate(roles)]
    kwargs = draw(st.sampled_from([{}, {}, {"enable_thinking": False}, {"enable_thinking": True}]))
    tools = [tool(draw(texts))] if draw(st.integers(0, 2)) == 0 else None
    return talk(*messages, tools=tools, **kwargs)


def to_train(conversation: dict[str, Any], loss_scope: str) -> list[dict[str, Any]]:
    answers = [message for message in conversation["messages"] if message["role"] == "assistant"]
    return [message for message in answers[-1 if loss_scope == "completion" else 0 :] if message.get("train", True)]


def check(chat: Chat, conversation: dict[str, Any]) -> str:
    try:
        rows = chat.rows(conversation)
    except TemplateError:
        return "template_error"
    except Rejected as fault:
        return fault.reason
    encoded = chat.proved(conversation, rows)
    for row, found in zip(rows, encoded, strict=True):
        assert chat.vocabulary.decode(found.input_ids) == row.text
    if chat.policy.loss_scope == "all":
        assert all(found.trained.all() for found in encoded)
        return "all"
    chosen = to_train(conversation, chat.policy.loss_scope)
    assert sum(len(row.spans) for row in rows) == len(chosen) > 0
    told = "".join(text for row in rows for text in spoken(row))
    for message in conversation["messages"]:
        for key in ("content", "reasoning_content"):
            mark = next((mark for mark in MARKS if mark in message.get(key, "")), None)
            is_dropped = key == "reasoning_content" and chat.policy.thinking == "drop"
            if mark is not None:
                assert told.count(mark) == (message in chosen and not is_dropped), mark
    assert sorted(weight for row in rows for weight in row.weights or [1.0] * len(row.spans)) == sorted(
        message.get("weight", 1.0) for message in chosen
    )
    return "rows" if len(rows) == 1 else "several rows"


MARKS = [f"{mark}{number}" for mark in "Ⓐⓣ" for number in range(6)]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_any_conversation_gives_proved_rows_or_a_reason(name: str):
    outcomes: Counter[str] = Counter()
    chats: dict[tuple[str, ...], Chat] = {}

    @settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(conversation=conversations(name), policy=st.fixed_dictionaries(POLICIES))
    def run(conversation: dict[str, Any], policy: dict[str, str]) -> None:
        key = tuple(policy.values())
        if key not in chats:
            chats[key] = family(name).with_policy(**policy)
        outcomes[check(chats[key], conversation)] += 1

    run()
    assert set(outcomes) <= REASONS | {"rows", "several rows", "all", "template_error"}
    assert outcomes["rows"] + outcomes["several rows"] + outcomes["all"] > 10, "next to nothing was proved"
