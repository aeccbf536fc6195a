"""Splits: by the prompt alone, so that neither a duplicate nor a think/no_think twin is in two of them."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sft_core.data.sources.splits import REPORT, SELECTION, TRAIN, assign, prompt_hash


def talk(user: Any, assistant: str = "Hi.", system: str | None = None, **more: Any) -> dict[str, Any]:
    first = [] if system is None else [{"role": "system", "content": system}]
    messages = [*first, {"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"messages": messages, **more}


BASE = prompt_hash(talk("What is Caffè 1²?"))


@pytest.mark.parametrize(
    "same",
    [
        talk("WHAT IS CAFFÈ 1²?"),
        talk("  What\tis\n\nCaffè\u00a01²? "),
        talk("What is Caffe\u0300 1²?"),
        talk("What is Caffè 12?"),
        talk("Ｗｈａｔ is Caffè 1²?"),
        talk([{"type": "text", "text": "What is "}, {"type": "text", "text": "Caffè 1²?"}]),
        talk("What is Caffè 1²?", assistant="Another answer"),
        talk("What is Caffè 1²? /no_think"),
        talk("What is Caffè 1²?", system="/think"),
        talk("What is Caffè 1²?", system=""),
        talk("What is Caffè 1²?", kwargs={"enable_thinking": False}),
    ],
)
def test_prompt_hash_of_a_duplicate_or_twin_is_the_same(same: dict[str, Any]):
    assert prompt_hash(same) == BASE


def test_prompt_hash_flag_in_a_system_text_is_no_difference():
    texts = ["Be brief.", "Be brief. /think", "/no_think\nBe brief."]
    assert len({prompt_hash(talk("Hello", system=text)) for text in texts}) == 1


def test_prompt_hash_reasoning_and_tool_results_are_no_difference():
    plain, twin = talk("Hello"), talk("Hello")
    twin["messages"][1]["reasoning_content"] = "They greet."
    twin["messages"].insert(1, {"role": "tool", "content": "3"})
    assert prompt_hash(plain) == prompt_hash(twin)


def test_prompt_hash_of_other_prompts_differs():
    others = [
        talk("What is Caffè 13?"),
        talk("What is Caffè 1²?", system="Be brief."),
        talk("What is Caffè 1²? /think_more"),
        {"messages": [*talk("What is Caffè 1²?")["messages"], {"role": "user", "content": "And 2?"}]},
        {"messages": [{"role": "system", "content": "What is Caffè 1²?"}]},
        {"text": "What is Caffè 1²!"},
    ]
    assert len({BASE, *map(prompt_hash, others)}) == len(others) + 1


def test_prompt_hash_of_raw_text_is_of_the_text():
    assert prompt_hash({"text": "Once  upon\na time"}) == prompt_hash({"text": "once upon a TIME"})


def test_assign_shares_are_about_right():
    hashes = np.array([prompt_hash(talk(f"question {number}")) for number in range(20_000)], dtype=np.uint64)
    shares = np.bincount(assign(hashes, selection_share=0.02, report_share=0.05), minlength=3) / len(hashes)
    # 5 standard deviations of a share of 5 % of 20,000 are 0.8 %.
    assert np.abs(shares[[TRAIN, SELECTION, REPORT]] - [0.93, 0.02, 0.05]).max() < 0.008


def test_assign_shares_hold_at_both_ends_of_the_hashes():
    ends = np.array([0, 2**64 - 1], dtype=np.uint64)
    assert assign(ends, selection_share=0.0, report_share=0.0).tolist() == [TRAIN, TRAIN]
    assert assign(ends, selection_share=0.1, report_share=0.1).tolist() == [REPORT, TRAIN]
    assert assign(ends, selection_share=0.1, report_share=0.0).tolist() == [SELECTION, TRAIN]


def test_assign_more_selection_leaves_the_report_split_as_it_is():
    hashes = np.random.default_rng(0).integers(0, 2**64, 2000, dtype=np.uint64)
    few = assign(hashes, selection_share=0.02, report_share=0.1) == REPORT
    many = assign(hashes, selection_share=0.3, report_share=0.1) == REPORT
    assert few.sum() > 100
    assert (few == many).all()


shares = st.floats(0, 0.49)


@given(arrays(np.uint64, st.integers(1, 40)), shares, shares, st.randoms(use_true_random=False))
def test_assign_is_a_function_of_the_hash_alone(hashes, selection_share, report_share, random):
    options = {"selection_share": selection_share, "report_share": report_share}
    together = assign(hashes, **options)
    assert together.tolist() == [int(assign(hashes[i : i + 1], **options)[0]) for i in range(len(hashes))]
    order = random.sample(range(len(hashes)), len(hashes))
    assert (assign(hashes[order], **options) == together[order]).all()


@given(st.text(max_size=40), st.text(max_size=40))
def test_prompt_hash_does_not_see_answers_flags_or_white_space(question: str, answer: str):
    spaced = f"\n {question}\t "
    assert prompt_hash(talk(question, answer)) == prompt_hash(talk(spaced, "other", system="/no_think"))
    assert 0 <= prompt_hash(talk(question)) < 2**64
