from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_core.evaluate.comparison import mean_difference
from sft_core.evaluate.rows import ROWS
from sft_core.evaluate.summary import thinking_gains


def save(folder: Path, score: dict[int, float | None], num_tokens: int = 3, cut_off: bool = False) -> Path:
    n = len(score)
    columns: dict[str, list[Any]] = {
        "row_id": [str(row) for row in range(n)],
        "prompt_hash": list(score),
        "nll": [1.0] * n,
        "num_trained": [2] * n,
        "prompt": ["2 + 2"] * n,
        "answer": ["4"] * n,
        "num_correct": [1] * n,
        "outputs": [["4"]] * n,
        "num_generated": [[num_tokens]] * n,
        "cut_off": [[cut_off]] * n,
        "scores": [[value] for value in score.values()],
        "score": list(score.values()),
    }
    folder.mkdir()
    pq.write_table(pa.table(columns, schema=ROWS), folder / "rows.parquet")
    return folder


def test_thinking_gains_pairs_rows_by_prompt(tmp_path: Path) -> None:
    # In another order, and each with a row that the other has not; by position the interval would be another.
    folders = {
        "sum_no_think": save(
            tmp_path / "a", {1: False, 2: True, 2**63: False, 4: False, 9: True, 11: None}, num_tokens=5
        ),
        "sum_think": save(
            tmp_path / "b", {4: True, 2**63: True, 2: False, 1: False, 7: False, 11: True}, num_tokens=40, cut_off=True
        ),
    }
    (found,) = thinking_gains(folders)
    before, after = np.array([0, 1, 0, 0]), np.array([0, 0, 1, 1])
    gain = mean_difference(before, after)
    assert (found["task"], found["n"]) == ("sum", 4)
    assert (found["no_think"], found["think"], found["gain"]) == (0.25, 0.5, 0.25)
    assert (found["tokens no_think"], found["tokens think"]) == (5, 40)
    assert (found["cut off no_think"], found["cut off think"]) == (0, 1)
    assert (found["gain"], found["low"], found["high"]) == pytest.approx((gain.value, gain.low, gain.high), abs=1e-6)


def test_thinking_gains_without_a_twin_or_shared_prompts_is_nothing(tmp_path: Path) -> None:
    rows = {1: True, 2: False, 3: True}
    other = {4: True, 5: False, 3: True}
    assert thinking_gains({"copy_no_think": save(tmp_path / "a", rows)}) == []
    assert thinking_gains({"copy": save(tmp_path / "b", rows), "copy_think": save(tmp_path / "c", rows)}) == []
    assert thinking_gains({"x_no_think": tmp_path / "a", "x_think": save(tmp_path / "d", other)}) == []
