import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_core.data.packing.held_out import held_out_rows
from sft_core.data.shards.token_shards import INDEX, TokenRow
from sft_core.data.sources import splits
from sft_core.evaluate.tasks import served_prompt

SHARES = {"selection_share": 0.2, "report_share": 0.5}


def index_of(
    hashes: list[int], num_trained: list[int] | None = None, answers: list[str | None] | None = None
) -> pa.Table:
    n = len(hashes)
    columns = {
        "row_id": [str(row) for row in range(n)],
        "prompt_hash": hashes,
        "prompt": ["2 + 2"] * n,
        "answer": answers or [None] * n,
        "num_tokens": [10] * n,
        "num_trained": num_trained or [3] * n,
    }
    return pa.table(columns, schema=INDEX)


def chosen(index: pa.Table) -> tuple[np.ndarray, list[int]]:
    rows = held_out_rows(index, splits.REPORT, **SHARES)
    return rows, index["prompt_hash"].to_numpy()[rows].tolist()


hashes = st.lists(st.integers(0, 30).map(lambda value: value * 2**64 // 31), min_size=1, max_size=60)


@given(hashes)
def test_report_rows_are_the_unique_prompts_of_the_split(values: list[int]) -> None:
    rows, found = chosen(index_of(values))
    split = splits.assign(np.array(values, np.uint64), **SHARES)
    assert found == sorted({value for value, one in zip(values, split, strict=True) if one == splits.REPORT})
    assert len(set(rows.tolist())) == len(rows)


@given(hashes, st.randoms(use_true_random=False))
def test_report_rows_twins_in_another_order_are_the_same_prompts(values: list[int], random: object) -> None:
    twin = [*values, *values[:3]]
    random.shuffle(twin)  # type: ignore[attr-defined]
    _, found = chosen(index_of(values))
    _, of_twin = chosen(index_of(twin))
    assert found == of_twin


def test_report_rows_are_in_the_order_of_prompt_hashes() -> None:
    values = [value * 2**56 for value in (90, 20, 50, 10)]
    rows, _ = chosen(index_of(values))
    assert rows.tolist() == [3, 1, 2, 0]


def test_report_rows_without_trained_tokens_are_left_out() -> None:
    rows, _ = chosen(index_of([5, 5, 6], num_trained=[0, 4, 0]))
    assert rows.tolist() == [1]


def test_report_rows_of_one_conversation_take_the_one_with_the_answer() -> None:
    # A conversation whose old thinking is dropped is several rows with one prompt hash; the last has the answer.
    rows, _ = chosen(index_of([7, 7, 4, 4, 7], answers=[None, "yes", None, None, "no"]))
    assert rows.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("trained", "length"),
    [([0, 0, 0, 1, 1, 0], 3), ([0, 1, 1, 0, 0, 1, 1, 0], 5), ([0, 1, 0, 1], 3), ([1, 1, 1], 0), ([1, 1, 0, 1], 3)],
)
def test_served_prompt_ends_where_the_last_trained_turn_starts(trained: list[int], length: int) -> None:
    ids = np.arange(10, 10 + len(trained), dtype=np.int32)
    assert served_prompt(TokenRow(ids, np.array(trained, np.uint8))).tolist() == ids[:length].tolist()
