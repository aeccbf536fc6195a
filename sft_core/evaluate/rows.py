"""The scored rows of a task: the right answer, the model's answers and their scores, and the scores over all rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa
import pyarrow.compute as pc

from sft_core.evaluate.scores import Score, mean_score, perplexity, strip_thinking, token_accuracy, token_loss
from sft_core.parquet import read_table

# A row that was not asked has nulls from `outputs` on. Lists have an entry for each sample.
ROWS = pa.schema(
    [
        ("row_id", pa.string()),
        ("prompt_hash", pa.uint64()),
        ("nll", pa.float64()),
        ("num_trained", pa.int32()),
        ("num_correct", pa.int32()),  # of the trained tokens, those that are the likeliest
        ("prompt", pa.string()),  # as a server would get it; null where the row is trained from its first token
        ("answer", pa.string()),  # the right one
        ("outputs", pa.list_(pa.string())),
        ("num_generated", pa.list_(pa.int32())),  # tokens, with the stop token
        ("cut_off", pa.list_(pa.bool_())),
        ("scores", pa.list_(pa.float64())),
        ("score", pa.float64()),  # their mean
    ]
)


class ScoredRow(TypedDict):
    """A row of ROWS."""

    row_id: str
    prompt_hash: int
    nll: float
    num_trained: int
    num_correct: int
    prompt: str | None
    answer: str | None
    outputs: list[str] | None
    num_generated: list[int] | None
    cut_off: list[bool] | None
    scores: list[float] | None
    score: float | None


def scores(table: pa.Table, metric: str) -> list[Score]:
    """Loss, perplexity and token accuracy over all rows, and the metric's score over the asked rows."""
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


class AnswerCounts(TypedDict):
    """See EvaluatedCounts."""

    answers: int
    empty: int
    cut_off: int
    generated_tokens: float | None


def answer_counts(table: pa.Table) -> AnswerCounts:
    """How many answers there are over all samples, how many are empty without thinking or cut off; and mean tokens."""
    lengths = of_samples(table, "num_generated")
    return {
        "answers": len(lengths),
        "empty": sum(not strip_thinking(output) for output in of_samples(table, "outputs")),
        "cut_off": sum(of_samples(table, "cut_off")),
        "generated_tokens": round(sum(lengths) / len(lengths), 2) if lengths else None,
    }


def read_rows(folder: Path) -> pa.Table:
    return read_table(folder / "rows.parquet")
