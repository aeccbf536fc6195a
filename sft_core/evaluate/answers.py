"""Questions to a model and its answers, for the scores of report rows and of a search's selection rows."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft_core.data.shards.token_shards import TokenRow
from sft_core.evaluate.engine import Engine, Request
from sft_core.evaluate.metrics.metric import Asked, Metric, Question
from sft_core.evaluate.scores import strip_thinking
from sft_core.parquet import read_table

if TYPE_CHECKING:
    from pydantic import JsonValue

log = logging.getLogger(__name__)


def asked_of(
    metric: Metric,
    index: pa.Table,
    rows: list[TokenRow],
    stops: list[int],
    tokenizer: Any,
    conversations: Path | None,
) -> dict[int, Asked]:
    """The right answers to the rows that are asked, by the rows' places in `index` and `rows`.

    A row is asked where the metric says so and its prompt is known. conversations: the folder of the canonical
    conversations; None for a metric that does not read them. Raises ValueError for an answer that the metric cannot
    read, and where it finds nothing to ask.
    """
    by_id = _conversations(conversations, index["row_id"]) if conversations else {}
    asked_rows: dict[int, Asked] = {}
    num_unknown = 0
    for place, answer in enumerate(index["answer"].to_pylist()):
        row_id, row = index["row_id"][place].as_py(), rows[place]
        target = tokenizer.decode(without_stop(trained_turn(row), stops), skip_special_tokens=False)
        try:
            asked = metric.ask(Question(row_id, answer, strip_thinking(target), by_id.get(row_id)))
        except ValueError as error:
            raise ValueError(f"row {row_id}: {error}") from error
        if asked is not None and len(served_prompt(row)):
            asked_rows[place] = asked
        num_unknown += asked is not None and place not in asked_rows
    if num_unknown:
        log.warning(
            "not_asked=%d rows are trained from their first token: where the prompt ends is unknown", num_unknown
        )
    if not asked_rows and not num_unknown and metric.nothing_to_ask is not None:
        raise ValueError(
            f"the metric {metric.name} finds nothing to ask in the task's {len(rows)} report rows: "
            f"{metric.nothing_to_ask}"
        )
    return asked_rows


def _conversations(folder: Path, row_ids: pa.ChunkedArray) -> dict[str, dict[str, JsonValue]]:
    """The canonical conversations of rows, by row id."""
    table = read_table(folder / "conversations.parquet", ["row_id", "conversation"])
    table = table.filter(pc.is_in(table["row_id"], value_set=row_ids.combine_chunks()))
    pairs = zip(table["row_id"].to_pylist(), table["conversation"].to_pylist(), strict=True)
    return {row_id: json.loads(text) for row_id, text in pairs}


class Output(NamedTuple):
    text: str  # without the stop token
    num_tokens: int  # with the stop token
    cut_off: bool  # the limit of new tokens ended it


def generate_outputs(engine: Engine, tokenizer: Any, request: Request) -> list[list[Output]]:
    """The answers to each prompt, one for each sample."""
    outputs: list[Output] = []
    for ids in engine.write(request):
        kept = without_stop(ids, request.stop_ids)
        text = tokenizer.decode(kept, skip_special_tokens=False)
        outputs.append(Output(text, len(ids), len(kept) == len(ids)))
    return [outputs[start : start + request.num_samples] for start in range(0, len(outputs), request.num_samples)]


def stop_ids(model: Any) -> list[int]:
    stop = model.generation_config.eos_token_id
    return stop if isinstance(stop, list) else [stop]


def without_stop(ids: np.ndarray, stops: list[int]) -> np.ndarray:
    return ids[:-1] if len(ids) and int(ids[-1]) in stops else ids


def trained_turn(row: TokenRow) -> np.ndarray:
    """The ids of the last trained turn, with its stop token. int32, shape (tokens,)."""
    start = len(served_prompt(row))
    ids, trained = row.input_ids[start:], row.trained[start:]
    ends = np.flatnonzero(trained == 0)
    return ids[: ends[0]] if len(ends) else ids


def served_prompt(row: TokenRow) -> np.ndarray:
    """The ids before the last trained turn, as a server would get them. int32, shape (tokens,).

    Empty for a row that is trained from its first token: the end of its prompt is unknown.
    """
    starts = np.flatnonzero(np.diff(row.trained.astype(np.int8), prepend=0) == 1)
    assert len(starts), "a report row has trained tokens"
    return row.input_ids[: starts[-1]]
