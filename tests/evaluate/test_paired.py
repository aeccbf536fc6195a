"""Two models on the same rows: their scores' difference, over what both scored, with a paired interval."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sft_core.evaluate.metrics import paired_gain
from sft_core.evaluate.paired import difference
from sft_core.evaluate.rows import ROWS, scores


def table(rows: list[dict[str, Any]]) -> pa.Table:
    blank = {
        "row_id": "r",
        "nll": 1.0,
        "num_trained": 1,
        "answer": "a",
        "output": "o",
        "correct": True,
        "cut_off": False,
    }
    return pa.Table.from_pylist([{**blank, **row} for row in rows], schema=ROWS)


def made(seed: int, numbers: range) -> pa.Table:
    rng = np.random.default_rng(seed)
    return table(
        [
            {
                "row_id": f"r{number}",
                "prompt_hash": number,
                "nll": float(rng.gamma(4.0)) * (3 + number % 5),
                "num_trained": 3 + number % 5,
                "answer": str(number),
                "correct": bool(rng.random() < 0.5),
            }
            for number in numbers
        ]
    )


@pytest.mark.parametrize("metric", ["loss", "exact_match"])
def test_difference_is_that_of_the_two_scores(metric: str):
    first, second = made(1, range(50)), made(2, range(50))
    values = [next(score.value for score in scores(one) if score.metric == metric) for one in (first, second)]
    found = difference(metric, first, second)
    assert found is not None and found.n == 50
    assert found.value == pytest.approx(values[1] - values[0])
    assert abs(found.value) > 0.01 and found.low < found.value < found.high


def test_difference_of_exact_match_has_the_interval_of_the_paired_gain():
    first, second = made(1, range(50)), made(2, range(50))
    found = difference("exact_match", first, second)
    pairs = [np.array(one["correct"].to_pylist(), dtype=float) for one in (first, second)]
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx(paired_gain(*pairs))


def test_difference_pairs_by_prompt_in_any_order_and_over_what_both_scored():
    first, second = made(1, range(30)), made(2, range(10, 40))
    shuffled = second.take(np.random.default_rng(0).permutation(30))
    found = difference("exact_match", first, shuffled)
    alike = difference("exact_match", first.slice(10), second.slice(0, 20))
    assert found == alike and found is not None and found.n == 20


def test_difference_leaves_out_rows_that_wanted_something_else():
    first = table([{"prompt_hash": n, "answer": str(n), "correct": False} for n in range(4)])
    second = table([{"prompt_hash": n, "answer": str(n % 3), "correct": True} for n in range(4)])
    found = difference("exact_match", first, second)
    assert found is not None and (found.n, found.value) == (3, 1.0)


def test_difference_of_losses_needs_the_same_rows_in_as_many_tokens():
    first = table([{"prompt_hash": n, "num_trained": 2} for n in range(4)])
    assert difference("loss", first, table([{"prompt_hash": n, "num_trained": 3} for n in range(4)])) is None
    assert difference("loss", first, table([{"prompt_hash": n, "num_trained": 2} for n in range(4)])) is not None


@pytest.mark.parametrize("metric", ["loss", "exact_match"])
def test_difference_of_fewer_than_two_shared_rows_is_none(metric: str):
    first = table([{"prompt_hash": n, "row_id": str(n)} for n in range(5)])
    second = table([{"prompt_hash": n, "row_id": str(n)} for n in range(4, 9)])
    assert difference(metric, first, second) is None
    unanswered = table([{"prompt_hash": n, "correct": None} for n in range(5)])
    assert difference("exact_match", first, unanswered) is None
