"""The scored rows of a task: what was wanted, what came, and the scores that follow from them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sft_core.evaluate.metrics import Score, mean_score, token_loss

ROWS = pa.schema(
    [
        ("row_id", pa.string()),
        ("prompt_hash", pa.uint64()),
        ("nll", pa.float64()),
        ("num_trained", pa.int32()),
        ("answer", pa.string()),
        ("output", pa.string()),
        ("correct", pa.bool_()),
        ("cut_off", pa.bool_()),
    ]
)


def scores(table: pa.Table) -> list[Score]:
    """Loss over all rows, and exact match over those that have an answer."""
    found = [token_loss(table["nll"].to_numpy(), table["num_trained"].to_numpy())]
    correct = table["correct"].drop_null()
    if len(correct):
        found.append(mean_score("exact_match", correct.to_numpy(zero_copy_only=False).astype(float)))
    return found


def read_rows(folder: Path) -> pa.Table:
    return pq.read_table(folder / "rows.parquet")
