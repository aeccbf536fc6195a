"""Which turns a row trains: three tools' ways of saying it, one canonical form, and what is no choice."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_core.data.sources.formats.conversations import canonical, row_id
from sft_core.data.sources.rejects import Rejected
from sft_core.data.sources.splits import prompt_hash

USER = {"role": "user", "content": "Hello"}
ANSWER = {"role": "assistant", "content": "Hi."}


def talk(first: dict[str, Any], **user: Any) -> dict[str, Any]:
    """A conversation of two exchanges; the first answer and user have their own keys."""
    return canonical({"messages": [USER | user, ANSWER | first, USER, ANSWER]})


def reason(row: dict[str, Any]) -> str:
    with pytest.raises(Rejected) as fault:
        canonical(row)
    assert str(fault.value)
    return fault.value.reason


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"train": False}, {"train": False}),
        ({"training": False}, {"train": False}),
        ({"weight": 0}, {"train": False}),
        ({"weight": 0.0}, {"train": False}),
        ({"train": False, "weight": 0.5}, {"train": False}),
        ({"train": False, "training": False, "weight": 0}, {"train": False}),
        ({"weight": 0.5}, {"weight": 0.5}),
        ({"train": True, "weight": 2}, {"weight": 2.0}),
        ({"train": True}, {}),
        ({"training": True}, {}),
        ({"weight": 1}, {}),
        ({"weight": 1.0, "train": None, "training": None}, {}),
        ({"train": None, "weight": None, "train_detail": []}, {}),
    ],
)
def test_assistant_turn_choice_has_one_form(said: dict[str, Any], expected: dict[str, Any]):
    assert talk(said)["messages"] == [USER, ANSWER | expected, USER, ANSWER]


def test_sharegpt_turns_of_axolotl_are_chosen_by_train_and_training():
    turns = [
        {"from": "human", "value": "Hello", "train": False},
        {"from": "gpt", "value": "Hi.", "train": False},
        {"from": "function_call", "value": '{"name": "f", "arguments": {}}', "weight": 0},
        {"from": "gpt", "value": "Hi.", "training": True},
    ]
    found = canonical({"conversations": turns})["messages"]
    assert [message.get("train", True) for message in found] == [True, False, False, True]
    assert "tool_calls" in found[2] and "train" not in found[0]


def test_users_and_tools_turns_may_say_that_they_are_not_trained():
    for said in ({"train": False}, {"training": False}, {"weight": 0}, {"train": None}):
        assert talk({}, **said) == talk({})


@pytest.mark.parametrize(
    "said",
    [
        {"train": "false"},
        {"train": 0},
        {"training": "no"},
        {"weight": -1},
        {"weight": math.nan},
        {"weight": math.inf},
        {"weight": 10**400},
        {"weight": "0.5"},
        {"weight": True},
        {"weight": [1]},
        {"train": True, "training": False},
        {"train": True, "weight": 0},
        {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]},
    ],
)
def test_assistant_turn_with_no_valid_choice_refuses_its_row(said: dict[str, Any]):
    assert reason({"messages": [USER, ANSWER | said, USER, ANSWER]}) == "invalid_train"


@pytest.mark.parametrize("said", [{"train": True}, {"training": True}, {"weight": 1}, {"weight": 0.5}, {"train": "x"}])
@pytest.mark.parametrize("turn", [USER, {"role": "system", "content": "x"}, {"role": "tool", "content": "x"}])
def test_training_on_what_the_model_does_not_write_refuses_the_row(turn: dict[str, Any], said: dict[str, Any]):
    assert reason({"messages": [turn | said, USER, ANSWER]}) == "invalid_train"


def test_row_that_trains_no_turn_is_refused():
    assert reason({"messages": [USER, ANSWER | {"train": False}, USER, ANSWER | {"weight": 0}]}) == "no_trained_turn"
    assert reason({"messages": [USER]}) == "no_assistant_turn"


def test_choices_move_the_row_id_but_not_the_split():
    kinds = [talk({}), talk({"train": False}), talk({"weight": 0.5})]
    assert len({row_id(kind) for kind in kinds}) == 3
    assert len({prompt_hash(kind) for kind in kinds}) == 1
    assert row_id(talk({"weight": 2})) == row_id(talk({"weight": 2.0}))


anything = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.sampled_from(["", "true", "1"])


@given(said=st.dictionaries(st.sampled_from(["train", "training", "weight"]), anything))
def test_any_choice_is_canonical_and_stable_or_refused(said: dict[str, Any]):
    try:
        found = talk(said)
    except Rejected as fault:
        assert fault.reason == "invalid_train"
        return
    message = found["messages"][1]
    assert message.get("train") in (None, False) and message.get("weight") != 1
    assert not {"train", "weight"} <= set(message)
    assert math.isfinite(message.get("weight", 1.0)) and message.get("weight", 1.0) > 0
    assert canonical(found) == found
