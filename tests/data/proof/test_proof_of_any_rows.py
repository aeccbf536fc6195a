"""The mask proof on any rows: what is true passes by every template, what is spoiled anywhere does not."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sft_core.data.proof.mask import MaskProofFailed
from sft_core.data.sources.rejects import Rejected
from sft_core.data.tokenizer.encoded import encode_rows
from tests.data.families import CHATML, TAGS, Chat, assistant, call, result, system, talk, tool, user, vocabulary
from tests.data.proof.spoiled import (
    BLOCKS,
    START,
    STOP,
    THINKING,
    TOOLS,
    TURNS,
    Group,
    alike,
    chat,
    group,
    moved,
)
from tests.data.rendering.test_rendering import CHATML as PLAIN
from tests.data.rendering.test_rendering import REWRITES

# What is true passes


def test_conversations_of_one_shape_are_proved_by_their_form():
    made = group(chat(), *(alike(TURNS, number) for number in range(300)))
    counts = made.prove()
    # Two turns' forms; the first conversation and two more are audited.
    assert counts == {"rows": 300, "turns": 600, "prompts": 2 + 3, "forms": 2}


def test_conversations_with_tools_of_their_own_are_proved_by_their_form():
    each = [{**alike(TOOLS, number), "tools": [tool(f"Adds {number}.")]} for number in range(100)]
    counts = group(chat(), *each).prove()
    assert counts["turns"] == 200
    assert counts["prompts"] < 10


def test_tool_results_inside_of_json_are_proved_by_their_form():
    quoted = PLAIN.replace(
        "message['content'] +", "(message['content'] | tojson if message['role'] == 'tool' else message['content']) +"
    )
    assert quoted != PLAIN
    each = [talk(user(f"Q{n}"), assistant("Wait."), result(f'say "{n}"\n'), assistant("So.")) for n in range(20)]
    made = group(chat(quoted), *each)
    assert r'"say \"3\"\n"' in made.rows[3].text
    assert made.prove()["prompts"] < 6


@pytest.mark.parametrize("normalizer", [normalizers.NFC(), normalizers.NFKC(), None], ids=str)
def test_vocabulary_that_normalizes_passes_and_its_faults_are_told(normalizer: Any):
    own = vocabulary((*CHATML, *TAGS), eos=STOP)
    if normalizer:
        own.backend_tokenizer.normalizer = normalizer
    chat = Chat(own, PLAIN)
    texts = ["e\u0301 cafe\u0301", "\ufb01ne", "plain", f"{STOP} e\u0301", "\u212b"]
    made = group(chat, *(talk(user(one), assistant(other)) for one in texts for other in texts))
    changed = [
        own.decode(row.input_ids) != of.text
        for row, of in zip(encode_rows(chat.encoder, made.table()), made.rows, strict=True)
    ]
    assert any(changed) == (normalizer is not None)
    assert made.prove()["turns"] == 25
    for row in (0, 1, 7, 24):
        for start, end in ((-1, 0), (1, 0), (0, 1), (0, -1)):
            bad = dataclasses.replace(made, rows=list(made.rows))
            bad.rows[row] = moved(made.rows[row], 0, start, end)
            with pytest.raises(MaskProofFailed):
                bad.prove()


def test_vocabulary_that_writes_spaces_as_a_letter_passes():
    """What is typed of that letter reads back as a space."""
    letters = {letter: number for number, letter in enumerate("▁\n" + "".join(map(chr, range(33, 127))))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="never")
    tokenizer.add_special_tokens([AddedToken(token) for token in CHATML])
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=STOP, name_or_path="letters")
    made = group(Chat(own, PLAIN), talk(user("a b"), assistant("c d")), talk(user("a▁b"), assistant("c ▁d")))
    assert made.prove()["turns"] == 2
    made.rows[1] = moved(made.rows[1], 0, 1)
    with pytest.raises(MaskProofFailed, match="says what no message says"):
        made.prove()


# Properties

SHORT = [
    "",
    "a",
    "Hi",
    "Hi.",
    " ",
    "\n",
    "\n\n",
    "é",
    "👋🏽",
    "e\u0301",
    "assistant\n",
    "user",
    "think",
    STOP,
    START,
    "<think>",
]
short = st.lists(st.sampled_from(SHORT), max_size=3).map("".join)


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    """Short texts, so that turns often say the same, or what a template writes."""
    kwargs = draw(st.sampled_from([{}, {"enable_thinking": False}]))
    messages = [system(draw(short))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(user(draw(short)))
        if draw(st.booleans()):
            messages += [assistant("", tool_calls=[call(a=1, b=draw(short))]), result(draw(short))]
        train = {} if draw(st.booleans()) else {"train": False}
        thinking = draw(short) if draw(st.booleans()) and not kwargs else None
        messages.append(assistant(draw(short.filter(str.strip)), thinking, **train))
    messages.append(user("last"))
    messages.append(assistant(draw(short.filter(str.strip)) + "!"))
    return talk(*messages, header=False, **kwargs)


def true_rows(chat: Chat, several: list[dict[str, Any]]) -> Group:
    kept = []
    for conversation in several:
        try:
            chat.rows(conversation)
        except Rejected:
            continue
        kept.append(conversation)
    assume(kept)
    return group(chat, *kept)


POLICIES = [
    {},
    {"thinking": "drop"},
    {"thinking": "only_last"},
    {"thinking": "inline"},
    {"empty_thinking": "masked"},
    {"empty_thinking": "trained"},
]
CHATS = st.tuples(st.sampled_from([THINKING, PLAIN, REWRITES, BLOCKS]), st.sampled_from(POLICIES))
RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


@pytest.mark.slow
@settings(RELAXED, max_examples=150)
@given(several=st.lists(conversations(), min_size=1, max_size=5), made=CHATS)
def test_any_true_rows_pass(several, made):
    template, policy = made
    rows = true_rows(chat(template, **policy), several)
    counts = rows.prove()
    assert counts["rows"] == len(rows.rows)
    assert counts["turns"] == sum(len(row.spans) for row in rows.rows) > 0


@pytest.mark.slow
@settings(RELAXED, max_examples=60)
@given(several=st.lists(conversations(), min_size=1, max_size=4), made=CHATS, data=st.data())
def test_any_rows_that_are_trained_whole_pass_and_no_others(several, made, data):
    template, policy = made
    for message in (message for conversation in several for message in conversation["messages"]):
        message.pop("train", None)
    rows = true_rows(chat(template, loss_scope="all", **policy), several)
    assert rows.prove()["rows"] == len(rows.rows) > 0
    row = data.draw(st.integers(0, len(rows.rows) - 1))
    place = data.draw(st.integers(0, len(rows.rows[row].text)))
    rows.rows[row] = dataclasses.replace(
        rows.rows[row], text=f"{rows.rows[row].text[:place]}X{rows.rows[row].text[place:]}"
    )
    rows.rows[row] = moved(rows.rows[row], 0, 0, 1)
    with pytest.raises(MaskProofFailed, match="is not what the template writes"):
        rows.prove()


@pytest.mark.slow
@settings(RELAXED, max_examples=150)
@given(several=st.lists(conversations(), min_size=1, max_size=4), made=CHATS, data=st.data())
def test_any_border_moved_is_told(several, made, data):
    template, policy = made
    rows = true_rows(chat(template, **policy), several)
    number = data.draw(st.integers(0, len(rows.rows) - 1))
    row = rows.rows[number]
    borders = [offset for span in row.spans for offset in span]
    place = data.draw(st.integers(0, len(borders) - 1))
    around = [0, *borders, len(row.text)]
    # Anywhere between its neighbours, which it may touch: then a turn or what stands between two is gone.
    borders[place] = data.draw(st.integers(around[place], around[place + 2]))
    changed = list(zip(borders[::2], borders[1::2], strict=True))
    rows.rows[number] = dataclasses.replace(row, spans=changed)
    if changed == row.spans:
        rows.prove()
    else:
        with pytest.raises(MaskProofFailed):
            rows.prove()


@pytest.mark.slow
@settings(RELAXED, max_examples=150)
@given(several=st.lists(conversations(), min_size=1, max_size=4), made=CHATS, data=st.data())
def test_any_tokens_masked_otherwise_are_told(several, made, data):
    template, policy = made
    rows = true_rows(chat(template, **policy), several)
    encoded = encode_rows(rows.chat.encoder, rows.table())
    trained = encoded.trained.copy()
    start = data.draw(st.integers(0, len(trained) - 1))
    end = data.draw(st.integers(start + 1, min(len(trained), start + 12)))
    trained[start:end] = data.draw(st.integers(0, 1))
    rows.spoil = lambda encoded: dataclasses.replace(encoded, trained=trained)
    if (trained == encoded.trained).all():
        rows.prove()
    else:
        with pytest.raises(MaskProofFailed):
            rows.prove()


@st.composite
def repeated(draw: st.DrawFn) -> dict[str, Any]:
    """Turns of which many say the same, users and assistants alike; some are only read."""
    says = st.sampled_from(["Hi", "Hi", "a"])
    messages = [system(draw(says))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(2, 4))):
        read = {} if draw(st.booleans()) else {"train": False}
        thinking = draw(says) if draw(st.booleans()) else None
        messages += [user(draw(says)), assistant(draw(says), thinking, **read)]
    assume(any(message.get("train", message["role"] == "assistant") for message in messages))
    return talk(*messages, header=False)


@pytest.mark.slow
@settings(RELAXED, max_examples=300)
@given(several=st.lists(repeated(), min_size=1, max_size=4), made=CHATS, data=st.data())
def test_any_turns_trained_in_place_of_others_are_told(several, made, data):
    """Each span begins where a turn, a thought or an answer does, and ends with a stop token."""
    template, policy = made
    rows = true_rows(chat(template, **policy), several)
    number = data.draw(st.integers(0, len(rows.rows) - 1))
    row = rows.rows[number]
    starts = [found.end() for found in re.finditer(r"assistant\n|user\n|<think>\n|</think>\n\n", row.text)]
    places = [(start, row.text.index(STOP, start) + len(STOP)) for start in starts]
    chosen = data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=4))
    changed = sorted({end: start for start, end in chosen}.items())
    rows.rows[number] = dataclasses.replace(row, spans=[(start, end) for end, start in changed])
    if rows.rows[number].spans == row.spans:
        rows.prove()
    else:
        with pytest.raises(MaskProofFailed):
            rows.prove()
