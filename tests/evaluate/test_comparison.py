import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_core.evaluate.comparison import bootstrapped, by_change, differences
from sft_core.evaluate.rows import ROWS
from sft_core.evaluate.scores import mean_score


def table(scores: list[float | None], seed: int = 0, better: float = 0.0) -> pa.Table:
    """Rows whose losses hang on the seed's rows, lower by `better` a token, with these scores."""
    rng, n = np.random.default_rng(seed), len(scores)
    num_trained = rng.integers(2, 40, n)
    nll = num_trained * (rng.gamma(4, 0.2, n) - better)
    columns = {
        "row_id": [str(row) for row in range(n)],
        "prompt_hash": np.arange(n, dtype=np.uint64),
        "nll": nll,
        "num_trained": num_trained,
        "num_correct": (num_trained * 0.5).astype(int),
        "prompt": ["2 + 2"] * n,
        "answer": ["4"] * n,
        "outputs": [None if score is None else [f"wrote {score}"] for score in scores],
        "num_generated": [None if score is None else [3] for score in scores],
        "cut_off": [None if score is None else [False] for score in scores],
        "scores": [None if score is None else [score] for score in scores],
        "score": scores,
    }
    return pa.table(columns, schema=ROWS)


def test_differences_are_tuned_minus_base_with_the_paired_interval() -> None:
    rng = np.random.default_rng(1)
    before = (rng.random(300) < 0.4).astype(float)
    after = np.maximum(before, rng.random(300) < 0.2)
    found = differences(table(before.tolist()), table(after.tolist(), better=0.1), "numeric")
    assert list(found) == ["loss", "perplexity", "token_accuracy", "numeric"]
    normal, score = mean_score("gain", after - before), found["numeric"]
    assert (score.n, score.value) == (300, pytest.approx(normal.value))
    assert normal.stderr is not None and score.low is not None and score.high is not None
    assert score.high - score.value == pytest.approx(1.96 * normal.stderr, abs=0.008)
    assert score.value - score.low == pytest.approx(1.96 * normal.stderr, abs=0.008)
    unpaired = math.hypot(before.std(), after.std()) / math.sqrt(300)
    assert normal.stderr < 0.8 * unpaired, "the pairing is of use"
    assert found["loss"].value == pytest.approx(-0.1)
    # Each row's loss falls by as much: paired there is no noise at all, whatever the rows are.
    assert (found["loss"].low, found["loss"].high) == (pytest.approx(-0.1), pytest.approx(-0.1))
    assert found["token_accuracy"].value == found["token_accuracy"].high == 0
    assert found["perplexity"].value < 0


def test_differences_pair_rows_by_prompt_and_leave_out_what_one_side_lacks() -> None:
    base, tuned = table([0.0, 1.0, None, 1.0]), table([1.0, 1.0, 1.0, 0.0])
    swapped = tuned.take([3, 2, 1, 0])
    assert differences(base, swapped, "exact_match") == differences(base, tuned, "exact_match")
    found = differences(base, swapped.slice(1), "exact_match")
    assert (found["loss"].n, found["exact_match"].n) == (3, 2)
    assert found["exact_match"].value == 0.5
    assert differences(base, tuned.slice(0, 0), "exact_match") == {}


@pytest.mark.slow
def test_difference_interval_holds_the_truth_in_95_of_100_cases() -> None:
    rng, num_held = np.random.default_rng(2), 0
    for _ in range(200):
        num_trained = rng.integers(5, 50, 80).astype(float)
        row_noise = rng.normal(0, 0.3, 80)
        base = num_trained * (2 + row_noise)
        tuned = num_trained * (1.5 + row_noise + rng.normal(0, 0.2, 80))
        found = bootstrapped(
            (base, num_trained, tuned, num_trained), lambda *sums: sums[2] / sums[3] - sums[0] / sums[1]
        )
        assert found.low is not None and found.high is not None
        num_held += found.low <= -0.5 <= found.high
    assert 178 <= num_held <= 199  # 4 standard errors of a binomial around 190


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0])), min_size=2, max_size=30))
def test_difference_is_inside_its_interval_and_the_same_each_time(pairs: list[tuple[float, float]]) -> None:
    before, after = (np.array(side) for side in zip(*pairs, strict=True))
    n = len(pairs)

    def mean(before: np.ndarray, after: np.ndarray) -> np.ndarray:
        return (after - before) / n

    found = bootstrapped((before, after), mean)
    assert found == bootstrapped((before, after), mean)
    assert found.low is not None and found.high is not None
    assert found.low - 1e-9 <= found.value <= found.high + 1e-9
    assert math.isclose(found.value, float((after - before).mean()), abs_tol=1e-9)


def test_difference_of_one_row_has_no_interval() -> None:
    found = differences(table([0.0]), table([1.0]), "exact_match")["exact_match"]
    assert (found.n, found.value, found.low, found.high) == (1, 1.0, None, None)


def test_changed_rows_are_won_and_lost_the_largest_change_first() -> None:
    base = table([0.0, 1.0, 0.5, 1.0, 0.0, None, 1.0, 1.0, 0.0])
    tuned = table([1.0, 0.5, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    won, lost, same = by_change(base, tuned)
    assert [pair[0]["row_id"] for pair in won] == ["0", "2"]
    assert [pair[0]["row_id"] for pair in lost] == ["3", "7", "1"]
    assert [pair[0]["row_id"] for pair in same] == ["4", "8", "6"], "a row that was not asked is in none"


def with_column(rows: pa.Table, name: str, values: list[object]) -> pa.Table:
    place = ROWS.get_field_index(name)
    return rows.set_column(place, ROWS.field(place), pa.array(values, ROWS.field(place).type))


def test_differences_leave_out_rows_that_wanted_something_else() -> None:
    base, tuned = table([0.0] * 4), table([1.0] * 4)
    found = differences(base, with_column(tuned, "answer", ["4", "4", "4", "5"]), "exact_match")
    assert (found["exact_match"].n, found["exact_match"].value, found["loss"].n) == (3, 1.0, 4)
    tokens = tuned["num_trained"].to_pylist()
    found = differences(base, with_column(tuned, "num_trained", [tokens[0] + 1, *tokens[1:]]), "exact_match")
    assert (found["exact_match"].n, found["loss"].n) == (4, 3)
