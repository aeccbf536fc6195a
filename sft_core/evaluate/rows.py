"""The scored rows of a task: what each wanted, what the model wrote, and the scores that follow from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sft_core.evaluate.scores import Score, mean_score, perplexity, strip_thinking, token_accuracy, token_loss

# A row that was not asked has nulls from `outputs` on. Lists have an entry a sample.
ROWS = pa.schema(
    [
        ("row_id", pa.string()),
        ("prompt_hash", pa.uint64()),
        ("nll", pa.float64()),
        ("num_trained", pa.int32()),
        ("num_correct", pa.int32()),  # of the trained tokens, those that are the likeliest
        ("prompt", pa.string()),  # what a server would be sent; null where the row is trained from its first token
        ("answer", pa.string()),  # what the row wanted
        ("outputs", pa.list_(pa.string())),
        ("num_generated", pa.list_(pa.int32())),  # tokens, the stop token with them
        ("cut_off", pa.list_(pa.bool_())),
        ("scores", pa.list_(pa.float64())),
        ("score", pa.float64()),  # their mean
    ]
)


def scores(table: pa.Table, metric: str) -> list[Score]:
    """Loss, perplexity and token accuracy over all rows, and the metric's score over those that were asked."""
    nll, num_trained, num_correct = (table[name].to_numpy() for name in ("nll", "num_trained", "num_correct"))
    loss = token_loss(nll, num_trained)
    task_scores = [loss, perplexity(loss), token_accuracy(num_correct, num_trained)]
    asked = table["score"].drop_null()
    if len(asked):
        task_scores.append(mean_score(metric, asked.to_numpy()))
    return task_scores


def of_samples(table: pa.Table, column: str) -> list[Any]:
    """The values of a list column, of all samples of all rows."""
    return pc.list_flatten(table[column]).to_pylist()


def answer_counts(table: pa.Table) -> dict[str, Any]:
    """Counts over all samples: of answers, of those empty without their thinking, of those cut off; and mean tokens."""
    lengths = of_samples(table, "num_generated")
    return {
        "answers": len(lengths),
        "empty": sum(not strip_thinking(output) for output in of_samples(table, "outputs")),
        "cut_off": sum(of_samples(table, "cut_off")),
        "generated_tokens": round(sum(lengths) / len(lengths), 2) if lengths else None,
    }


def read_rows(folder: Path) -> pa.Table:
    return pq.read_table(folder / "rows.parquet")
