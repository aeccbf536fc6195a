"""Over-long rows split at turns: every turn that fits is trained once, behind its own question, as it is served."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_core.data.packing.plan import PackPlan
from sft_core.data.packing.windows import split_at_turns
from sft_core.data.rendering.spans import RenderedRow
from sft_core.data.shards.token_shards import TokenShards, read_index, read_windows
from sft_core.data.sources.formats.conversations import canonical
from sft_core.recipe.parse import parse_recipe
from steps.pack import PACKED, rows_to_pack
from steps.tokenize import TOKENS
from steps.windows import WINDOWS

STOP = "<|im_end|>"


def turn(number: int, size: int = 1, **more: Any) -> list[dict[str, Any]]:
    asked, said = {"role": "user", "content": f"q{number}."}, {"role": "assistant", "content": f"a{number}." * size}
    return [asked, {**said, **more}]


def talk(*turns: list[dict[str, Any]], system: str | None = None) -> dict[str, Any]:
    head = [{"role": "system", "content": system}] if system else []
    return canonical({"messages": head + [message for pair in turns for message in pair]})


def turns_of(conversation: dict[str, Any]) -> list[int]:
    return [index for index, message in enumerate(conversation["messages"]) if message["role"] == "assistant"]


def by_characters(max_length: int) -> Callable[[dict[str, Any]], list[RenderedRow] | None]:
    """A window's row by the characters of what is said, as long as those are at most `max_length`."""

    def rows(window: dict[str, Any]) -> list[RenderedRow] | None:
        text = "".join(message["content"] for message in window["messages"])
        trained = [i for i in turns_of(window) if window["messages"][i].get("train", True)]
        return [RenderedRow(text, [], [], True, turns=trained)] if len(text) <= max_length else None

    return rows


def texts(conversation: dict[str, Any], max_length: int, turns: list[int] | None = None) -> list[str]:
    wanted = turns_of(conversation) if turns is None else turns
    return [rows[0].text for _, rows in split_at_turns(conversation, wanted, by_characters(max_length))]


def test_windows_hold_as_many_whole_exchanges_as_fit_behind_the_head():
    conversation = talk(*(turn(number) for number in range(5)), system="S.")
    assert texts(conversation, 14) == ["S.q0.a0.q1.a1.", "S.q2.a2.q3.a3.", "S.q4.a4."]
    assert texts(conversation, 100) == ["S.q0.a0.q1.a1.q2.a2.q3.a3.q4.a4."]


def test_windows_exchange_that_is_too_long_alone_is_left_out_and_the_others_stay():
    conversation = talk(turn(0), turn(1, size=50), turn(2))
    assert texts(conversation, 12) == ["q0.a0.", "q2.a2."]


def test_windows_exchange_with_tools_keeps_the_turns_that_fit():
    call = {"role": "assistant", "content": "c.", "tool_calls": [{"name": "f", "arguments": {}}]}
    long = [turn(0)[0], call, {"role": "tool", "content": "r."}, {"role": "assistant", "content": "x" * 90}]
    assert texts(talk(long, turn(1)), 12) == ["q0.c.", "q1.a1."]


def test_windows_turns_that_are_not_to_be_trained_stay_as_context():
    conversation = talk(turn(0), turn(1), turn(2), turn(3))
    windows = split_at_turns(conversation, [3, 7], by_characters(12))
    trained = [
        [m["content"] for m in w["messages"] if m["role"] == "assistant" and "train" not in m] for w, _ in windows
    ]
    assert [rows[0].text for _, rows in windows] == ["q0.a0.q1.a1.", "q2.a2.q3.a3."]
    assert trained == [["a1."], ["a3."]]


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 8), min_size=1, max_size=12), max_length=st.integers(4, 40), system=st.booleans())
def test_windows_of_any_conversation_train_each_turn_that_fits_once(sizes: list[int], max_length: int, system: bool):
    pairs = [turn(number, size) for number, size in enumerate(sizes)]
    conversation = talk(*pairs, system="S." if system else None)
    windows = split_at_turns(conversation, turns_of(conversation), by_characters(max_length))
    said = [m["content"] for w, _ in windows for m in w["messages"] if m["role"] == "assistant"]
    fits = [p[1]["content"] for p in pairs if 2 * system + len(p[0]["content"] + p[1]["content"]) <= max_length]
    assert said == fits
    for window, rows in windows:
        assert len(rows[0].text) <= max_length
        assert (window["messages"][0]["role"] == "system") == system


# The stage


@pytest.fixture
def long_source(write_rows: Callable) -> dict[str, Any]:
    rows = [talk(turn(0)), talk(*(turn(n, size=3) for n in range(6)), system="Be kind."), talk(turn(1, size=99))]
    return {"name": "s", "path": str(write_rows("a.jsonl", rows))}


def test_stage_windows_are_packed_in_the_place_of_the_long_row(long_source, pinned, ensure, quickstart):
    recipe = pinned(long_source, packing={"max_length": 120, "over_long": "split"})
    packs, manifest = ensure(PACKED, recipe)
    tokens, windows = ensure(TOKENS, recipe, source="s")[0], ensure(WINDOWS, recipe, source="s")[0]
    lengths = read_index(tokens)["num_tokens"].to_pylist()
    assert [length > 120 for length in lengths] == [False, True, True]
    found = read_windows(tokens, windows)
    assert set(found.of_row.tolist()) == {1}
    assert len(found.of_row) >= 2
    counts = manifest["counts"]
    assert (counts["dropped"], counts["split"]) == ({"s": 1}, {"s": 1})
    assert counts["windows"] == {"s": len(found.of_row)}
    assert ensure(WINDOWS, recipe, source="s")[1]["counts"]["lost_turns"] == 1
    plan, shards = PackPlan.read(packs), TokenShards(tokens, windows)
    assert len(shards) == 3 + len(found.of_row)
    assert sorted(plan.row.tolist()) == [0, *range(3, len(shards))]
    answers = []
    for entry, row in enumerate(plan.row.tolist()):
        document = shards[row]
        assert len(document.input_ids) == plan.num_tokens[entry] <= 120
        text = quickstart.decode(document.input_ids)
        answers += [part.split(STOP)[0] for part in text.split("assistant\n")[1:]]
        assert document.trained.any()
        assert row == 0 or "Be kind." in text
    assert sorted(answers) == sorted(["a0."] + [f"a{n}." * 3 for n in range(6)])


def test_stage_without_over_long_rows_windows_are_none(long_source, pinned, ensure):
    recipe = pinned(long_source, packing={"max_length": 4000, "over_long": "split"})
    counts = ensure(PACKED, recipe)[1]["counts"]
    assert (counts["documents"], counts["split"], counts["dropped"]) == (3, {}, {})


def test_windows_are_made_only_where_the_recipe_splits(long_source, pinned):
    assert list(rows_to_pack(pinned(long_source), {})) == ["s"]
    assert list(rows_to_pack(pinned(long_source, packing={"over_long": "split"}), {})) == ["s", "windows of s"]


def test_split_with_loss_scope_all_is_refused(long_source):
    data = {
        "name": "x",
        "model": {"model_name_or_path": "a/b"},
        "dataset_mixture": {"datasets": [long_source]},
        "packing": {"over_long": "split"},
        "training": {"loss_scope": "all"},
    }
    with pytest.raises(ValueError, match=r"packing\.over_long: found 'split'; training\.loss_scope all"):
        parse_recipe(data)


def test_windows_of_repeated_rows_are_repeated_with_them(long_source, pinned, ensure):
    once, twice = (
        pinned({**long_source, "weight": weight}, packing={"max_length": 120, "over_long": "split"})
        for weight in (1.0, 2.0)
    )
    plans = [PackPlan.read(ensure(PACKED, recipe)[0]) for recipe in (once, twice)]
    rows = [np.unique(plan.row, return_counts=True) for plan in plans]
    assert rows[0][0].tolist() == rows[1][0].tolist()
    assert (rows[1][1] == 2 * rows[0][1]).all()
