"""The mask proof: a mask that trains anything else than its conversation says fails, with the row and what is wrong.

Each test begins with true rows, which pass, and spoils one thing. Before the spoiled conversation stand others of the
same shape, so that its form is known and no audit comes to its help, or none do.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from sft_core.data.tokenizer.encoded import EncodedRows
from tests.data.families import assistant, family, talk, user
from tests.data.proof.spoiled import (
    BEFORE,
    BLOCKS,
    START,
    STOP,
    THINKING,
    THINKS,
    TOOLS,
    TURNS,
    alike,
    chat,
    fails,
    group,
    moved,
    spoiled,
    with_span,
    without,
)
from tests.data.rendering.test_rendering import CHATML as PLAIN
from tests.data.rendering.test_rendering import REWRITES

# One border of a span


HEADER = len(f"{START}assistant\n")
BORDERS: dict[str, tuple[tuple[int, int, int], str]] = {
    "newline of the header": ((0, -1, 0), r"messages\[2\] is trained from '\\nHi, you.*not from 'Hi, you"),
    "a part of the header": ((1, -4, 0), r"messages\[4\] is trained from 'ant\\n<think>.*, not from the control token"),
    "the header": ((0, -HEADER, 0), r"messages\[2\] is trained from the control token in '<\|im_start\|>assistant"),
    "what the user says": ((0, -HEADER - 24, 0), r"messages\[1\], of the user, is trained and must not be"),
    "the newline after the stop": ((1, 0, 1), "what is trained does not end with a stop token"),
    "what follows the stop": ((0, 0, 10), "what is trained does not end with a stop token"),
    "no stop": ((1, 0, -len(STOP)), "what is trained does not end with a stop token"),
    "a part of the stop": ((0, 0, -1), "what is trained does not end with a stop token"),
    "the end cut off": ((0, 0, -len(STOP) - 1), "what is trained does not end with a stop token"),
    "the first character cut off": ((0, 1, 0), r"a trained turn says what no message says: 'i, you\.'"),
    "the opening tag cut off": ((1, len("<think>"), 0), r"messages\[4\] is trained from '\\n2\+2"),
    "the tag's newline cut off": ((1, len("<think>\n"), 0), r"messages\[4\] is trained from '2\+2"),
    "the thinking cut off": ((1, len("<think>\n2+2\n\nis 4\n</think>\n\n"), 0), "a trained turn says what no message"),
}


@BEFORE
@pytest.mark.parametrize("name", BORDERS)
def test_border_moved_is_told_with_the_row(name: str, num_before: int):
    (span, start, end), fault = BORDERS[name]
    made = spoiled(chat(), TURNS, num_before)
    made.rows[-1] = moved(made.rows[-1], span, start, end)
    fails(made, fault)


@BEFORE
@pytest.mark.parametrize("by", [-1, 1])
def test_mask_shifted_by_a_token_is_told(by: int, num_before: int):
    made = spoiled(chat(), TURNS, num_before)

    def shift(encoded: EncodedRows) -> EncodedRows:
        trained = encoded.trained.copy()
        here = slice(*encoded.offsets[-2:])
        trained[here] = np.roll(trained[here], by)
        return dataclasses.replace(encoded, trained=trained)

    made.spoil = shift
    fails(made, {1: "says what no message says: 'i, you", -1: "does not end with a stop token"}[by])


@BEFORE
@pytest.mark.parametrize("edge", ["first", "inner", "stop", "before", "after"])
def test_mask_of_a_single_token_is_told(edge: str, num_before: int):
    made = spoiled(chat(), TURNS, num_before)

    def flip(encoded: EncodedRows) -> EncodedRows:
        trained = encoded.trained.copy()
        start, end = (np.flatnonzero(np.diff(trained, append=0)) + 1)[-2:].tolist()
        place = {"first": start, "inner": start + 3, "stop": end - 1, "before": start - 1, "after": end}[edge]
        trained[place] ^= 1
        return dataclasses.replace(encoded, trained=trained)

    made.spoil = flip
    faults = {"first": "is trained from|says what no", "inner": "not end with", "stop": "not end with"}
    fails(made, faults.get(edge, "is trained from|not end with"))


@BEFORE
def test_white_space_around_what_is_said_belongs_to_it(num_before: int):
    """The content's own white space is trained, the template's is not: neither may pass for the other."""
    made = spoiled(chat(PLAIN), talk(user("Hello"), assistant("  \n Hi. \n")), num_before)
    for start in (1, 2, 3, 4):
        made.rows[-1] = moved(made.rows[-1], 0, start)
        fails(made, r"messages\[1\] is trained from")
        made.rows[-1] = moved(made.rows[-1], 0, -start)
    made.prove()


def test_content_that_a_template_trims_is_proved_as_it_is_served():
    trims = PLAIN.replace("message['content']", "message['content'] | trim")
    made = group(chat(trims), *(talk(user("Hello"), assistant(f"{space}Hi.{space}")) for space in ("", " ", "\n", " ")))
    assert [row.text.count("Hi.<|im_end|>") for row in made.rows] == [1] * 4
    assert made.prove()["turns"] == 4
    made.rows[-1] = moved(made.rows[-1], 0, -1)
    fails(made, r"is trained from '\\nHi\.")


# Turns


@BEFORE
@pytest.mark.parametrize("span", [0, 1])
def test_turn_left_out_is_told(span: int, num_before: int):
    made = spoiled(chat(), TURNS, num_before)
    made.rows[-1] = without(made.rows[-1], span)
    # Without the last one, the row goes on after what it trains.
    fails(
        made, [r"messages \[2\] are to be trained|served prompt of messages\[4\]", "text follows the last turn"][span]
    )


def test_row_that_trains_nothing_is_told():
    made = spoiled(chat(), TURNS, 3)
    made.rows[-1] = dataclasses.replace(made.rows[-1], spans=[])
    fails(made, "nothing of it is trained")


ELSEWHERE = {
    "a word of the system": (TURNS, "kind", "does not end with a stop token"),
    "the system's turn": (TURNS, f"Be kind.{STOP}", r"messages\[0\], of the system, is trained and must not be"),
    "the user's turn": (TURNS, f"And now?{STOP}", r"messages\[3\], of the user, is trained and must not be"),
    "a stop token": (TURNS, STOP, "a trained turn says what no message says: its end"),
    "a header and its stop": (
        TURNS,
        f"{START}user\nAnd now?{STOP}",
        r"messages\[3\], of the user, is trained and must",
    ),
    "a tool's result": (TOOLS, "It is 3.", "does not end with a stop token"),
    "a tool's turn": (TOOLS, f"It is 3.\n</tool_response>{STOP}", r"messages\[3\], of the tool, is trained and must"),
    "the tools": (TOOLS, '"description": "Adds."', "does not end with a stop token"),
}


@BEFORE
@pytest.mark.parametrize("name", ELSEWHERE)
def test_text_of_others_that_is_trained_is_told(name: str, num_before: int):
    conversation, text, fault = ELSEWHERE[name]
    made = spoiled(chat(), conversation, num_before)
    made.rows[-1] = with_span(made.rows[-1], text)
    fails(made, fault)


@BEFORE
def test_whole_row_trained_is_told(num_before: int):
    made = spoiled(chat(), TURNS, num_before)
    made.rows[-1] = dataclasses.replace(made.rows[-1], spans=[(0, len(made.rows[-1].text))])
    fails(made, "does not end with|says what no message|must not be")


@BEFORE
def test_users_turn_that_says_the_same_as_the_answer_is_not_taken_for_it(num_before: int):
    made = spoiled(chat(PLAIN), talk(user("Hi."), assistant("Hi."), user("Hi."), assistant("Hi.")), num_before)
    text, true = made.rows[-1].text, made.rows[-1].spans
    places = [found.start() for found in re.finditer(re.escape(f"Hi.{STOP}"), text)]
    assert [start for start, _ in true] == places[1::2]
    tried = 0
    for chosen in ([0, 1], [0, 3], [1, 2], [2, 3], [0, 2], [0, 1, 3], [1, 2, 3], [0, 1, 2, 3]):
        spans_of = [(places[place], places[place] + len(f"Hi.{STOP}")) for place in chosen]
        made.rows[-1] = dataclasses.replace(made.rows[-1], spans=spans_of)
        fails(made, "served prompt|is trained|must not be|again")
        tried += 1
    assert tried == 8


@BEFORE
@pytest.mark.parametrize("last_user", ["Hello", "", "Bye"])
def test_turn_that_is_only_read_is_not_trained_in_place_of_one_that_says_the_same(last_user: str, num_before: int):
    read = talk(user("Hello"), assistant("Hi.", train=False), user(last_user), assistant("Hi."))
    made = spoiled(chat(PLAIN), read, num_before)
    row = made.rows[-1]
    assert len(row.spans) == 1
    start = row.text.index("Hi.")
    made.rows[-1] = dataclasses.replace(row, spans=[(start, start + len(f"Hi.{STOP}"))])
    fails(made, r"what is trained stands inside of the served prompt of messages\[3\]")
    made.rows[-1] = with_span(row, f"Hi.{STOP}")
    fails(made, "served prompt of|again|must not be")


@BEFORE
def test_turn_after_one_that_is_to_be_trained_is_not_taken_for_it(num_before: int):
    """The same question and answer twice, of which the first is to be trained: its row ends with it."""
    twice = talk(user("Hello"), assistant("Hi."), user("Hello"), assistant("Hi.", train=False))
    made = spoiled(chat(PLAIN), twice, num_before)
    assert made.rows[-1].text.count("Hi.") == 1
    both = talk(user("Hello"), assistant("Hi."), user("Hello"), assistant("Hi."))
    (row,) = made.chat.rows(both)
    made.rows[-1] = without(row, 0)
    fails(made, "is trained from|text follows|served prompt")


@BEFORE
@pytest.mark.parametrize("scope", ["assistant", "completion"])
def test_turns_by_scope_others_are_told(scope: str, num_before: int):
    made = spoiled(
        chat(PLAIN, loss_scope=scope), talk(user("a"), assistant("A1"), user("b"), assistant("B2")), num_before
    )
    row = made.rows[-1]
    assert len(row.spans) == {"assistant": 2, "completion": 1}[scope]
    made.rows[-1] = without(row, 0) if scope == "assistant" else with_span(row, f"A1{STOP}")
    fails(made, {"assistant": "served prompt of|no row trains", "completion": "must not be"}[scope])


def test_turn_cut_at_a_stop_token_inside_of_it_is_told():
    """Serving would stop there; but that is not what the template ends a turn with."""
    two = PLAIN.replace("message['content'] + '", "message['content'] + '<|endoftext|> over")
    made = group(chat(two), talk(user("Q"), assistant("A")))
    (row,) = made.rows
    end = row.text.rindex("<|endoftext|>") + len("<|endoftext|>")
    assert row.text[end:] == f" over{STOP}\n"
    made.rows = [dataclasses.replace(row, text=row.text[:end], spans=[(row.spans[0][0], end)])]
    made.chat = dataclasses.replace(made.chat, extra_stop_tokens=("<|endoftext|>",))
    fails(made, r"messages\[1\] goes on after its stop token: the control token in '<\|endoftext\|> over")


# Thinking


@BEFORE
@pytest.mark.parametrize("template", [REWRITES, THINKING], ids=["qwen3", "thinking"])
def test_thinking_that_is_to_be_dropped_is_told(template: str, num_before: int):
    """The rows of the policy `keep` where the policy is `drop`."""
    made = spoiled(chat(template, thinking="drop"), THINKS, num_before)
    kept = group(chat(template), THINKS)
    assert "thought two" in kept.rows[-1].text
    made.rows[-1] = kept.rows[-1]
    fails(made, r"messages\[\d\] is not what the template writes|served prompt of")


@BEFORE
def test_thinking_that_the_history_has_to_forget_is_told(num_before: int):
    made = spoiled(chat(thinking="only_last"), THINKS, num_before)
    assert len(made.rows) - len(group(made.chat, *made.conversations[:-1]).rows) == 2
    (kept,) = chat().rows(THINKS)
    assert "thought one" in kept.text[: kept.spans[1][0]]
    made.rows[-1] = without(kept, 0)
    fails(made, r"the row does not begin with the served prompt of messages\[3\]")


@BEFORE
def test_thinking_written_twice_is_told(num_before: int):
    made = spoiled(chat(), talk(user("Q"), assistant("A", "a long thought"), header=False), num_before)
    row, block = made.rows[-1], "<think>\na long thought\n</think>\n\n"
    (start, end), text = row.spans[0], row.text.replace(block, block * 2)
    made.rows[-1] = dataclasses.replace(row, text=text, spans=[(start, end + len(block))])
    fails(made, r"messages\[1\] is not what the template writes: it has .*<think>.* where 'A<\|im_end")


@BEFORE
def test_thinking_without_its_white_space_is_told(num_before: int):
    made = spoiled(chat(), talk(user("Q"), assistant("A", " spaced  out "), header=False), num_before)
    row = made.rows[-1]
    for shorter, fault in (("spaced  out", "not what the template writes"), (" spaced out ", "says what no message")):
        changed = row.text.replace(" spaced  out ", shorter)
        cut = len(row.text) - len(changed)
        made.rows[-1] = dataclasses.replace(moved(row, 0, 0, -cut), text=changed)
        fails(made, fault)


def test_turn_without_its_answer_is_not_taken_for_one_that_only_thinks():
    made = group(chat(REWRITES), *(talk(user("Q"), assistant(text, f"T{text}")) for text in ("", "", "A")))
    made.prove()
    row = made.rows[-1]
    changed = row.text.replace(f"A{STOP}", STOP)
    made.rows[-1] = dataclasses.replace(moved(row, 0, 0, -1), text=changed)
    fails(made, "a trained turn says what no message says")


@BEFORE
@pytest.mark.parametrize("policy", ["as_served", "trained", "masked"])
def test_empty_think_block_is_trained_by_policy_alone(policy: str, num_before: int):
    one = talk(user("Q"), assistant("A"), enable_thinking=False, header=False)
    made = spoiled(chat(empty_thinking=policy), one, num_before)
    block = len("<think>\n\n</think>\n\n")
    by = -block if made.rows[-1].text[made.rows[-1].spans[0][0] :].startswith("A") else block
    made.rows[-1] = moved(made.rows[-1], 0, by)
    fails(made, r"messages\[1\] is trained from .*, not from")


@BEFORE
@pytest.mark.parametrize("enabled", [True, False])
def test_form_of_one_mode_is_no_proof_in_the_other(enabled: bool, num_before: int):
    """Both modes write the same text; only what is served tells them apart."""
    modes = {mode: talk(user("Q"), assistant("A"), enable_thinking=mode) for mode in (True, False)}
    one = chat(BLOCKS)
    made = group(one, *(alike(modes[mode], n) for n in range(num_before) for mode in modes), modes[enabled])
    made.prove()
    ((right,), (other,)) = one.rows(modes[enabled]), one.rows(modes[not enabled])
    assert right.text == other.text
    assert right.spans != other.spans
    made.rows[-1] = other
    fails(made, r"messages\[1\] is trained from")


# Turns that are served in another way than the history shows them

OPENED = talk(user("Q"), assistant("It is four.", "Two and two."))
SERVED = {
    "a thought twice": ("deepseek_r1", "Two and two.\n</think>\n\n", "Two and two.\n</think>\n\n" * 2),
    "a thought that is not closed": ("deepseek_r1", "\n</think>\n\n", "\n\n"),
    "a word before the thought": ("deepseek_r1", "Two and two.", "So: Two and two."),
    "a word before the answer": ("deepseek_r1", "It is four.", "So: It is four."),
    "a word after the answer": ("deepseek_r1", "It is four.", "It is four. So!"),
    "an answer twice": ("deepseek_r1", "It is four.", "It is four.It is four."),
    "a channel left out": ("gpt_oss", "<|end|><|start|>assistant<|channel|>final<|message|>", ""),
    "a word in a channel": ("gpt_oss", "Two and two.", "Two and two. So!"),
    "a channel twice": ("gpt_oss", "<|channel|>final<|message|>", "<|channel|>final<|message|>" * 2),
}


@pytest.mark.parametrize("name", SERVED)
def test_turn_that_is_not_as_it_is_served_is_told(name: str):
    of, text, other = SERVED[name]
    made = group(family(of), alike(OPENED, 1), OPENED)
    made.prove()
    row = made.rows[-1]
    start, end = row.spans[0]
    assert row.text.count(text, start) == 1
    changed = row.text[:start] + row.text[start:].replace(text, other)
    by = len(changed) - len(row.text)
    made.rows[-1] = dataclasses.replace(row, text=changed, spans=[(start, end + by)])
    fails(made, r"messages\[1\] is trained with .* which the template does not write|says what no|is not what the")


def test_thought_that_is_to_be_dropped_is_told_where_the_prompt_opens_it():
    one = family("deepseek_r1").with_policy(thinking="drop")
    made = group(one, alike(OPENED, 1), OPENED)
    made.prove()
    kept = group(family("deepseek_r1"), OPENED)
    assert made.rows[-1].text != kept.rows[-1].text
    made.rows[-1] = kept.rows[-1]
    fails(made, r"messages\[1\] is trained with|served prompt of")
