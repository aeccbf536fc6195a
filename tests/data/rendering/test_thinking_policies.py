"""The recipe's choices of what is trained: thinking, empty think blocks, shared rows, single turns, loss scopes."""

from typing import Any

import numpy as np
import pytest

from sft_core.data.sources.rejects import Rejected
from tests.data.families import (
    CHATML,
    TAGS,
    Chat,
    assistant,
    call,
    family,
    result,
    spoken,
    system,
    talk,
    tool,
    user,
    vocabulary,
)

STOP, EMPTY = "<|im_end|>", "<think>\n\n</think>\n\n"
THINKS = [user("Q1"), assistant("A1", "T1"), user("Q2"), assistant("A2", "T2")]
PLAIN = [user("Q1"), assistant("A1"), user("Q2"), assistant("A2")]
STEPS = [
    user("1+2?"),
    assistant("", "T1", tool_calls=[call(a=1)]),
    result("3"),
    assistant("A2", "T2"),
    user("Q2"),
    assistant("A3"),
]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture(scope="module")
def thinking() -> Chat:
    """The project's own template, which shows all thinking in history."""
    return family("thinking")


def own(*messages: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """For the project's template without its header."""
    return talk(*messages, header=False, **kwargs)


def trained(chat: Chat, conversation: dict[str, Any], **policy: str) -> list[list[str]]:
    """The trained texts of each row, read off its tokens, after the mask proof."""
    chosen = chat.with_policy(**policy)
    rows = chosen.rows(conversation)
    texts = []
    for row, found in zip(rows, chosen.proved(conversation, rows), strict=True):
        runs = np.flatnonzero(np.diff(found.trained.astype(int), prepend=0, append=0)).reshape(-1, 2)
        texts.append([chat.vocabulary.decode(found.input_ids[start:end]) for start, end in runs])
        assert texts[-1] == spoken(row)
    return texts


def thought(text: str) -> str:
    return f"<think>\n{text}\n</think>\n\n"


# Thinking


def test_thinking_keep_trains_it_and_later_turns_see_it(thinking):
    expected = [[f"{thought('T1')}A1{STOP}", f"{thought('T2')}A2{STOP}"]]
    assert trained(thinking, own(*THINKS)) == trained(thinking, own(*THINKS), thinking="keep") == expected


def test_thinking_drop_trains_answers_alone_as_one_is_served_that_does_not_think(thinking):
    assert trained(thinking, own(*THINKS), thinking="drop") == [[f"A1{STOP}", f"A2{STOP}"]]
    (row,) = thinking.with_policy(thinking="drop").rows(own(*THINKS))
    assert "T1" not in row.text
    assert "T2" not in row.text
    assert row.text.count(f"<|im_start|>assistant\n{EMPTY}A") == 2
    assert trained(family("qwen3"), talk(*THINKS), thinking="drop") == [[f"A1{STOP}"], [f"A2{STOP}"]]


def test_thinking_drop_switches_the_templates_mode(thinking):
    for chat, conversation in ((thinking, talk(*THINKS)), (family("smollm3"), talk(*THINKS))):
        (row,) = chat.with_policy(thinking="drop").rows(conversation)
        assert "/no_think" in row.text.split("<|im_start|>user")[0]
        on = {**conversation, "kwargs": {"enable_thinking": True}}
        (same,) = chat.with_policy(thinking="drop").rows(on)
        assert same.text == row.text, "the row's own mode gives way: there is no thinking left"


def test_thinking_drop_leaves_a_conversation_without_thinking_as_it_is(thinking):
    for chat, conversation in ((thinking, talk(*PLAIN)), (family("qwen3"), talk(*PLAIN))):
        assert chat.with_policy(thinking="drop").rows(conversation) == chat.rows(conversation)


def test_thinking_drop_of_a_turn_that_only_thinks_is_a_reject(thinking):
    with pytest.raises(Rejected) as fault:
        thinking.with_policy(thinking="drop").rows(own(user("Q1"), assistant("", "T1")))
    assert fault.value.reason == "empty_assistant_turn"
    called = own(user("Q1"), assistant("", "T1", tool_calls=[call(a=1)]))
    assert trained(thinking, {**called, "tools": [tool()]}, thinking="drop") == [[f"{CALL}{STOP}"]]


def test_thinking_only_last_trains_each_turn_as_a_server_without_old_thinking_shows_it(thinking):
    rows = thinking.with_policy(thinking="only_last").rows(own(*THINKS))
    assert [spoken(row) for row in rows] == [[f"{thought('T1')}A1{STOP}"], [f"{thought('T2')}A2{STOP}"]]
    assert trained(thinking, own(*THINKS), thinking="only_last") == [spoken(row) for row in rows]
    (served,) = {row.text[: row.spans[0][0]] for row in rows[1:]}
    history = [{key: of for key, of in message.items() if key != "reasoning_content"} for message in THINKS]
    assert served == thinking.served_prompt(own(*history), 3, tokenize=False)


def test_thinking_only_last_keeps_the_steps_since_the_last_question(thinking):
    conversation = {**own(*STEPS), "tools": [tool()]}
    steps = [f"{thought('T1')}{CALL}{STOP}", f"{thought('T2')}A2{STOP}"]
    assert trained(thinking, conversation, thinking="only_last") == [steps, [f"A3{STOP}"]]
    assert trained(thinking, conversation, thinking="keep") == [[*steps, f"A3{STOP}"]]


def test_thinking_only_last_is_what_a_template_that_drops_it_does_by_itself():
    for name in ("qwen3", "gpt_oss"):
        conversation = talk(*STEPS, tools=[tool()])
        assert family(name).with_policy(thinking="only_last").rows(conversation) == family(name).rows(conversation)


def test_thinking_only_last_without_old_thinking_is_one_row(thinking):
    conversation = own(*PLAIN, user("Q3"), assistant("A3", "T3"))
    expected = [[f"A1{STOP}", f"A2{STOP}", f"{thought('T3')}A3{STOP}"]]
    assert trained(thinking, conversation, thinking="only_last") == expected


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen2_5", "olmo2"])
def test_thinking_inline_is_trained_by_a_template_that_knows_none(name: str):
    chat, conversation = family(name), talk(*THINKS)
    assert chat.outcome(conversation) == "template_drops_thinking"
    stop = chat.vocabulary.eos_token
    ((first, second),) = trained(chat, conversation, thinking="inline")
    assert first.strip() == f"{thought('T1')}A1{stop}"
    assert second.strip() == f"{thought('T2')}A2{stop}"
    (row,) = chat.with_policy(thinking="inline").rows(conversation)
    assert thought("T1") in row.text[: row.spans[1][0]], "the history is what was said"


def test_thinking_inline_of_parts_and_of_turns_that_do_not_think():
    parts = [{"type": "text", "text": "A1"}]
    conversation = own(user("Q1"), {**assistant("", " T1\n"), "content": parts}, user("Q2"), assistant("A2"))
    chat = family("thinking")
    assert trained(chat, conversation, thinking="inline") == [[f"{thought('T1')}A1{STOP}", f"A2{STOP}"]]
    assert trained(chat, own(*PLAIN), thinking="inline") == trained(chat, own(*PLAIN))


def test_thinking_inline_tags_are_control_tokens_of_a_vocabulary_that_has_them():
    chat = family("chatml")
    vocabulary_of_tags = vocabulary([*CHATML, *TAGS], eos=STOP)
    tagged = Chat(vocabulary_of_tags, chat.source).with_policy(thinking="inline")
    conversation = talk(user("Q <think>"), assistant("A </think>", "T1"))
    rows = tagged.rows(conversation)
    (row,) = tagged.proved(conversation, rows)
    ids = row.input_ids.tolist()
    assert [ids.count(vocabulary_of_tags.convert_tokens_to_ids(tag)) for tag in TAGS[:2]] == [1, 1]


# Empty think blocks


@pytest.mark.parametrize(("policy", "expected"), [("as_served", "A1"), ("masked", "A1"), ("trained", f"{EMPTY}A1")])
def test_empty_thinking_in_the_prompt_is_trained_by_choice_alone(thinking, policy: str, expected: str):
    conversation = own(user("Q1"), assistant("A1"), enable_thinking=False)
    assert trained(thinking, conversation, empty_thinking=policy) == [[expected + STOP]]
    served = talk(user("Q1"), assistant("A1"), enable_thinking=False)
    assert trained(family("qwen3"), served, empty_thinking=policy) == [[expected + STOP]]


@pytest.mark.parametrize(
    ("policy", "expected"), [("as_served", f"{EMPTY}A1"), ("masked", "A1"), ("trained", f"{EMPTY}A1")]
)
def test_empty_thinking_that_the_turn_writes_is_masked_by_choice_alone(policy: str, expected: str):
    assert trained(family("qwen3"), talk(user("Q1"), assistant("A1")), empty_thinking=policy) == [[expected + STOP]]


@pytest.mark.parametrize(
    ("policy", "close"), [("as_served", "\n</think>\n\n"), ("masked", ""), ("trained", "\n</think>\n\n")]
)
def test_empty_thinking_that_the_prompt_opens_is_closed_by_the_turn(policy: str, close: str):
    chat = family("deepseek_r1")
    found = trained(chat, talk(user("Q1"), assistant("A1")), empty_thinking=policy)
    assert found == [[f"{close}A1{chat.vocabulary.eos_token}"]]


def test_empty_thinking_that_is_left_out_leaves_the_tokens_as_they_are_generated():
    """A prompt's newline and that before </think> are two tokens when it is served, and one as a text."""
    chat, conversation = family("deepseek_r1"), talk(user("Q1"), assistant("A1"))
    prompt = chat.served_prompt(conversation, 1)
    assert chat.vocabulary.encode("\n\n", add_special_tokens=False) != prompt[-1:] * 2, "the vocabulary merges nothing"
    for policy in ("as_served", "masked"):
        chosen = chat.with_policy(empty_thinking=policy)
        (row,) = chosen.proved(conversation, chosen.rows(conversation))
        assert row.input_ids.tolist()[: len(prompt) + 1] == [*prompt, prompt[-1]], policy


def test_empty_thinking_masked_takes_the_white_space_before_a_block():
    source = "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n<think></think>' if m.role == 'assistant' }}"
    source += "\n{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    chat = Chat(vocabulary((*CHATML, *TAGS), eos=STOP), source)
    assert trained(chat, talk(*PLAIN)) == [[f"\n<think></think>\nA1{STOP}", f"\n<think></think>\nA2{STOP}"]]
    assert trained(chat, talk(*PLAIN), empty_thinking="masked") == [[f"A1{STOP}", f"A2{STOP}"]]


@pytest.mark.parametrize("policy", ["as_served", "masked", "trained"])
def test_empty_thinking_says_nothing_of_real_thoughts(thinking, policy: str):
    expected = [[f"{thought('T1')}A1{STOP}", f"{thought('T2')}A2{STOP}"]]
    assert trained(thinking, own(*THINKS), empty_thinking=policy) == expected
    assert trained(family("qwen3"), talk(*THINKS), empty_thinking=policy) == [[text] for text in expected[0]]
    ((one,), _) = trained(family("deepseek_r1"), talk(*THINKS), empty_thinking=policy)
    assert one.startswith("T1\n</think>\n\nA1")


@pytest.mark.parametrize("policy", ["as_served", "masked", "trained"])
def test_empty_thinking_that_somebody_typed_is_text(thinking, policy: str):
    typed = own(user("Q1"), assistant(f"{EMPTY}A1", "T1"))
    assert trained(thinking, typed, empty_thinking=policy) == [[f"{thought('T1')}{EMPTY}A1{STOP}"]]


def test_empty_thinking_ids_of_the_block_are_those_of_the_prompt(thinking):
    """The choice moves the mask and leaves the tokens alone."""
    conversation = own(*PLAIN, enable_thinking=False)
    found = {}
    for policy in ("as_served", "masked", "trained"):
        chat = thinking.with_policy(empty_thinking=policy)
        (found[policy],) = chat.proved(conversation, chat.rows(conversation))
    served = found["as_served"]
    for policy in ("masked", "trained"):
        assert found[policy].input_ids.tolist() == served.input_ids.tolist()
    block = [thinking.vocabulary.convert_tokens_to_ids(token) for token in ("<think>", "</think>")]
    assert np.isin(served.input_ids, block).sum() == 4
    assert not served.trained[np.isin(served.input_ids, block)].any()
    assert found["trained"].trained[np.isin(served.input_ids, block)].all()
    assert found["masked"].trained.tolist() == served.trained.tolist() != found["trained"].trained.tolist()


# Rows that turns share


def test_served_prefix_text_shares_a_row_that_tokens_keep_apart():
    conversation = talk(user("Q1"), assistant("\n\nA1"), user("Q2"), assistant("A2"))
    chat = family("chatml")
    assert trained(chat, conversation) == [[f"\n\nA1{STOP}"], [f"A2{STOP}"]]
    assert trained(chat, conversation, served_prefix="text") == [[f"\n\nA1{STOP}", f"A2{STOP}"]]
    first, second = chat.rows(conversation)
    (shared,) = chat.with_policy(served_prefix="text").rows(conversation)
    assert shared.text == second.text
    assert shared.spans == [*first.spans, *second.spans]


def test_served_prefix_text_keeps_apart_what_differs_in_its_text():
    chat = family("qwen3")
    assert trained(chat, talk(*THINKS), served_prefix="text") == trained(chat, talk(*THINKS))


# Turns that the row chooses


def test_train_false_leaves_a_turn_in_the_context_alone(thinking):
    conversation = own(PLAIN[0], {**PLAIN[1], "train": False}, *PLAIN[2:])
    assert trained(thinking, conversation) == [[f"A2{STOP}"]]
    (row,) = thinking.rows(conversation)
    assert f"assistant\nA1{STOP}" in row.text[: row.spans[0][0]]
    assert row.text == thinking.rows(own(*PLAIN))[0].text


def test_train_false_of_the_last_turn_ends_the_row_before_it(thinking):
    conversation = own(*PLAIN[:3], {**PLAIN[3], "train": False})
    assert trained(thinking, conversation) == [[f"A1{STOP}"]]
    (row,) = thinking.rows(conversation)
    assert "Q2" not in row.text


@pytest.mark.parametrize("policy", [{}, {"loss_scope": "completion"}])
def test_train_false_of_all_that_could_be_trained_is_a_reject(thinking, policy: dict[str, str]):
    messages = [*PLAIN[:3], {**PLAIN[3], "train": False}]
    if not policy:
        messages[1] = {**messages[1], "train": False}
    with pytest.raises(Rejected) as fault:
        thinking.with_policy(**policy).rows(own(*messages))
    assert fault.value.reason == "no_trained_turn"


def test_weight_is_that_of_the_turns_own_span(thinking):
    turns = [PLAIN[0], {**PLAIN[1], "weight": 0.25}, PLAIN[2], PLAIN[3], user("Q3"), assistant("A3", weight=2)]
    conversation = own(*turns)
    (row,) = thinking.rows(conversation)
    assert row.weights == [0.25, 1.0, 2]
    thinking.proved(conversation, [row])
    skipped = own(turns[0], {**turns[1], "train": False}, *turns[2:])
    (row,) = thinking.rows(skipped)
    assert (spoken(row), row.weights) == ([f"A2{STOP}", f"A3{STOP}"], [1.0, 2])
    thinking.proved(skipped, [row])


def test_weight_follows_its_turn_into_a_row_of_its_own():
    conversation = talk(THINKS[0], {**THINKS[1], "weight": 0.5}, THINKS[2], {**THINKS[3], "weight": 3})
    rows = family("qwen3").rows(conversation)
    assert [row.weights for row in rows] == [[0.5], [3]]
    family("qwen3").proved(conversation, rows)
    last = talk(*THINKS[:3], {**THINKS[3], "weight": 3})
    assert [row.weights for row in family("qwen3").rows(last)] == [[], [3]]


def test_weight_of_1_everywhere_is_none(thinking):
    (row,) = thinking.rows(own(PLAIN[0], {**PLAIN[1], "weight": 1.0, "train": True}, *PLAIN[2:]))
    assert row.weights == []
    assert row == thinking.rows(own(*PLAIN))[0]


def test_choice_of_turns_is_hidden_from_the_template():
    source = family("chatml").source.replace("message.role ~", "(message | list | join(',')) ~ message.role ~", 1)
    source = source.replace("'<|im_start|>assistant", "'<|im_start|>role,contentassistant")
    chat = Chat(family("chatml").vocabulary, source)
    (row,) = chat.rows(talk(PLAIN[0], {**PLAIN[1], "train": True, "weight": 2.0}))
    assert row.text.count("role,content") == 2
    assert "train" not in row.text
    assert "weight" not in row.text


# Loss scopes


def test_loss_scope_completion_trains_the_last_turn_with_its_weight(thinking):
    conversation = own(*THINKS[:3], {**THINKS[3], "weight": 2})
    for chat, talk_of_it in ((thinking, conversation), (family("qwen3"), {**conversation, "kwargs": {}})):
        completion = chat.with_policy(loss_scope="completion")
        (row,) = completion.rows(talk_of_it)
        assert (spoken(row), row.weights) == ([f"{thought('T2')}A2{STOP}"], [2])
        completion.proved(talk_of_it, [row])


@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1", "gpt_oss", "mistral", "olmo3"])
def test_loss_scope_all_trains_every_token_of_one_row(name: str):
    conversation = talk(system("S"), *PLAIN, user("never answered"))
    chat = family(name).with_policy(loss_scope="all")
    (row,) = chat.rows(conversation)
    (found,) = chat.proved(conversation, [row])
    assert found.trained.all()
    assert "never answered" in row.text
    assert row.spans == [(0, len(row.text))]


@pytest.mark.parametrize("choice", [{"train": False}, {"weight": 2}])
def test_loss_scope_all_with_a_choice_of_turns_is_a_reject(thinking, choice: dict[str, Any]):
    with pytest.raises(Rejected) as fault:
        thinking.with_policy(loss_scope="all").rows(own(PLAIN[0], {**PLAIN[1], **choice}, *PLAIN[2:]))
    assert fault.value.reason == "turns_chosen"
