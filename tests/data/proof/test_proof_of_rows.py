"""The mask proof on ids, on rows and their conversations, on weights, and on rows that are trained whole."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sft_core.data.proof.decoded import DecodedRows, Vocabulary
from sft_core.data.proof.mask import MaskProofFailed
from sft_core.data.tokenizer.encoded import EncodedRows, encode_rows
from tests.data.families import assistant, call, result, system, talk, user
from tests.data.proof.spoiled import (
    BEFORE,
    START,
    STOP,
    THINKS,
    TURNS,
    Group,
    alike,
    chat,
    fails,
    group,
    moved,
    spoiled,
    without,
)
from tests.data.rendering.test_rendering import CHATML as PLAIN
from tests.data.rendering.test_rendering import REWRITES
from tests.data.rows import columns

# Ids


def with_ids(made: Group, change: Callable[[list[int]], tuple[list[int], list[int]]]) -> Group:
    """The last row with other ids; change: of its ids, those and their mask anew."""

    def spoil(encoded: EncodedRows) -> EncodedRows:
        start = int(encoded.offsets[-2])
        ids, trained = change(encoded.ids[start:].tolist())
        offsets = encoded.offsets.copy()
        offsets[-1] = start + len(ids)
        return EncodedRows(
            np.array([*encoded.ids[:start], *ids], dtype=np.int32),
            np.array([*encoded.trained[:start], *trained], dtype=np.uint8),
            offsets,
        )

    return dataclasses.replace(made, spoil=spoil)


@BEFORE
def test_id_any_changed_or_lost_is_told(num_before: int):
    made = spoiled(chat(PLAIN), talk(user("Hello"), assistant("So it is.")), num_before)
    (true,) = encode_rows(made.chat.encoder, columns(made.rows[-1]))
    mask, control = true.trained.tolist(), made.chat.vocabulary.convert_tokens_to_ids("<|endoftext|>")
    assert len(mask) > 15
    for place in range(len(mask)):
        for new in ([], [control], [65], [true.input_ids[place]] * 2):
            kept = [mask[place]] * len(new)
            changed = with_ids(
                made,
                lambda ids, at=place, new=new, kept=kept: (
                    [*ids[:at], *new, *ids[at + 1 :]],
                    [*mask[:at], *kept, *mask[at + 1 :]],
                ),
            )
            with pytest.raises(
                MaskProofFailed, match=r"decode to another text|control token|end with|nothing|says what"
            ):
                changed.prove()


TYPED = {
    "user": talk(user("say plain twice"), assistant("Hi.")),
    "system": talk(system("say plain twice"), user("Q"), assistant("Hi.")),
    "answer": talk(user("Q"), assistant("I say plain twice")),
    "history": talk(user("Q"), assistant("I say plain twice"), user("Q2"), assistant("Hi.")),
    "thinking": talk(user("Q"), assistant("Hi.", "say plain twice")),
    "result": talk(user("Q"), assistant("", tool_calls=[call(a=1)]), result("say plain twice"), assistant("Hi.")),
    "arguments": talk(user("Q"), assistant("", tool_calls=[call(b="say plain twice")])),
}


def typed(conversation: dict[str, Any], token: str) -> dict[str, Any]:
    return json.loads(json.dumps(conversation).replace("plain", token))


@BEFORE
@pytest.mark.parametrize("token", [STOP, START, "<think>", "<|endoftext|>"])
@pytest.mark.parametrize("place", TYPED)
def test_control_token_in_place_of_one_that_was_typed_is_told(place: str, token: str, num_before: int):
    conversation = typed(TYPED[place], token) | {"kwargs": {"header": False}}
    made = spoiled(chat(), conversation, num_before)
    (literal,) = [row.literals for row in made.rows[-1:]]
    assert len(literal) == 1
    made.rows[-1] = dataclasses.replace(made.rows[-1], literals=[])
    fails(made, "control token|says what no message says")


@BEFORE
@pytest.mark.parametrize("place", [0, 1])
def test_control_token_of_the_template_as_text_is_told(place: int, num_before: int):
    """Of a header and of the stop: the same characters, but nothing that a server would write or stop at."""
    made = spoiled(chat(PLAIN), talk(user("Hello"), assistant("Hi.")), num_before)
    row = made.rows[-1]
    start = (row.text.index(START), row.text.rindex(STOP))[place]
    made.rows[-1] = dataclasses.replace(row, literals=[(start, start + 10)])
    fails(made, ["the row does not begin with the served prompt", "does not end with a stop token"][place])


def test_ids_in_other_pieces_than_a_server_makes_are_told_where_a_row_is_audited():
    """The same characters in other tokens: no fault of a mask, so that looking at some rows is enough."""
    made = group(chat(PLAIN), talk(user("Hello there"), assistant("Hello there")))
    made.prove()
    row = made.rows[0]
    places = {"served prompt": row.text.index("llo"), "its text": row.text.rindex("llo")}
    true = encode_rows(made.chat.encoder, made.table()).ids.tolist()
    for what, place in places.items():
        made.rows[0] = dataclasses.replace(row, cuts=[place])
        changed = encode_rows(made.chat.encoder, made.table())
        assert changed.ids.tolist() != true
        fails(made, f"has other ids|{what}")


def test_first_turn_of_a_new_shape_is_tokenized_anew():
    made = group(chat(PLAIN), talk(user("Q"), assistant("A")), talk(user("Hello there"), user("Q"), assistant("A")))
    made.prove()
    made.rows[1] = dataclasses.replace(made.rows[1], cuts=[made.rows[1].text.index("llo")])
    fails(made, r"the served prompt of messages\[2\] has other ids")


# Rows


def test_rows_of_two_conversations_exchanged_are_told():
    made = group(chat(), *(alike(TURNS, number) for number in range(4)))
    made.prove()
    made.numbers[2:] = [3, 2]
    fails(made, "served prompt of|says what no message", row=2)


def test_rows_that_differ_in_the_system_text_alone_exchanged_are_told():
    kinds = [talk(system(text), user("Q"), assistant("A")) for text in ("Be so.", "Be kind.", "Be brief.", "Be bold.")]
    made = group(chat(PLAIN), *kinds)
    made.prove()
    made.numbers[2:] = [3, 2]
    fails(made, r"the row does not begin with the served prompt of messages\[2\]: it has 'rief", row=2)


def test_row_of_another_user_is_told_where_a_template_changes_what_users_say():
    """No form is learned of what cannot be found: it would hold the words of one user for all."""
    loud = PLAIN.replace("message['content']", "(message['content'] | upper)")
    made = group(chat(PLAIN), *(talk(user(text), assistant("A")) for text in ("q one", "q two", "q one")))
    made.chat = chat(loud)
    upper = [
        dataclasses.replace(row, text=re.sub("q (one|two)", lambda said: said[0].upper(), row.text))
        for row in made.rows
    ]
    made.rows = list(upper)
    made.prove()
    made.rows[1] = upper[0]
    fails(made, r"the row does not begin with the served prompt of messages\[1\]: it has 'ONE", row=1)


@pytest.mark.parametrize("says", [user, system, result], ids=["user", "system", "tool"])
def test_row_that_leaves_out_what_another_does_not_say_is_told(says: Callable[[str], dict[str, Any]]):
    each = [talk(says(text), user("Q"), assistant("A")) for text in ("", "", "word")]
    made = group(chat(PLAIN), *each)
    made.prove()
    made.rows[2] = made.rows[1]
    fails(made, r"the row does not begin with the served prompt of messages\[2\].* where 'word")


def test_row_of_another_result_is_told_where_a_template_changes_results():
    loud = PLAIN.replace("message['content']", "(message['content'] | replace(' ', '_'))")
    made = group(chat(PLAIN), *(talk(user("Q"), result(text), assistant("A")) for text in ("r one", "r two", "r one")))
    made.chat = chat(loud)
    made.rows = [dataclasses.replace(row, text=re.sub("r (one|two)", r"r_\1", row.text)) for row in made.rows]
    made.prove()
    made.rows[1] = made.rows[0]
    fails(made, r"the row does not begin with the served prompt of messages\[2\]: it has 'one", row=1)


def test_turns_of_a_row_in_another_order_are_told():
    made = group(chat(PLAIN), talk(user("Q"), assistant("One"), user("Q"), assistant("Two")))
    (longer,) = chat(PLAIN).rows(
        talk(user("Q"), assistant("One"), user("Q"), assistant("Two"), user("Q"), assistant("One"))
    )
    made.rows[0] = without(longer, 0)
    fails(made, r"messages\[1\], of the assistant, is trained after messages\[3\]")


def test_turns_end_with_their_row():
    one = chat(PLAIN)
    ids = np.array(one.vocabulary("abcdef").input_ids, dtype=np.int32)
    encoded = EncodedRows(ids, np.ones_like(ids, dtype=np.uint8), np.array([0, 2, len(ids)], dtype=np.int32))
    turns = DecodedRows(Vocabulary(one.vocabulary), encoded).turns(np.array([7_000]))
    assert [[(turn.first, turn.last) for turn in row] for row in turns] == [[(0, 2)], [(0, len(ids) - 2)]]
    assert len(ids) > 3


def test_row_there_twice_is_told():
    made = group(chat(), TURNS, alike(TURNS, 1))
    made.rows, made.numbers = [*made.rows, made.rows[-1]], [*made.numbers, 1]
    fails(made, r"messages\[4\], of the assistant, is trained again|messages\[2\], of the assistant, is trained again")


def test_row_left_out_of_several_is_told():
    made = group(chat(REWRITES), alike(THINKS, 1), THINKS)
    assert made.numbers == [0, 0, 1, 1]
    made.prove()
    del made.rows[2], made.numbers[2]
    fails(made, r"messages \[1\] are to be trained and no row trains them")


def test_rows_of_a_rewritten_history_exchanged_are_still_each_its_turn():
    made = group(chat(REWRITES), THINKS)
    made.rows.reverse()
    assert made.prove()["turns"] == 2


def test_row_beyond_the_conversations_is_an_error():
    made = group(chat(PLAIN), talk(user("Q"), assistant("A")))
    made.spoil = lambda encoded: encode_rows(made.chat.encoder, columns(*made.rows * 2))
    with pytest.raises(AssertionError, match="would not be checked"):
        made.prove()


# Weights

WEIGHED = talk(
    user("Q1"), assistant("A1", weight=0.5), user("Q2"), assistant("A2"), user("Q3"), assistant("A3", weight=2)
)


@BEFORE
@pytest.mark.parametrize("weights", [[], [0.5, 1], [2, 1, 0.5], [0.5, 1, 1], [0.5, 1, 2, 1], [0.51, 1, 2]], ids=str)
def test_weights_other_are_told(weights: list[float], num_before: int):
    made = spoiled(chat(PLAIN), WEIGHED, num_before)
    assert made.rows[-1].weights == [0.5, 1, 2]
    made.rows[-1] = dataclasses.replace(made.rows[-1], weights=weights)
    fails(made, r"the turns' weights are \[0\.5, 1\.0, 2\.0\]; the row has")


def test_weights_where_none_are_set_are_told():
    made = spoiled(chat(), TURNS, 3)
    made.rows[-1] = dataclasses.replace(made.rows[-1], weights=[1.0, 0.5])
    fails(made, r"the turns' weights are \[1\.0, 1\.0\]; the row has \[1\.0, 0\.5\]")


def test_weights_of_turns_that_are_one_run_are_told():
    """A weight is read for each run of trained tokens: two turns without a header between them share one."""
    joined = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    two = talk(user("Q"), assistant("A1", weight=0.5), assistant("A2"))
    made = group(chat(joined), two)
    assert made.rows[0].spans[0][1] == made.rows[0].spans[1][0]
    fails(made, r"the row has \[0\.5, 1\.0\] for 1 trained parts")


# Rows that are trained whole


def test_loss_scope_all_other_rows_are_told():
    one = chat(loss_scope="all")
    made = group(one, *(alike(TURNS, number) for number in range(4)))
    assert made.prove()["prompts"] < 4
    row = made.rows[-1]
    made.rows[-1] = moved(row, 0, 1)
    fails(made, "loss_scope all trains every token, and not token 0")
    made.rows[-1] = row
    made.numbers[2:] = [3, 2]
    fails(made, "the row is not what the template writes", row=2)


def test_raw_text_other_is_told():
    texts = [{"text": f"Once {STOP} upon a time {number}"} for number in range(2)]
    made = group(chat(loss_scope="all"), *texts)
    made.prove()
    made.numbers = [1, 0]
    fails(made, "the row is not its text and a stop token: it has '0<", row=0)
    made.numbers = [0, 1]
    made.rows[1] = dataclasses.replace(made.rows[1], literals=[])
    fails(made, "it has the control token in .* where '<")
