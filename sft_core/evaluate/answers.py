"""What rows ask a model, and what it answers: for the scores of the report split, and of a search's selection rows."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sft_core.data.shards import TokenRow
from sft_core.evaluate.metrics import strip_thinking
from sft_core.evaluate.scorers import DEFAULT, Asked, Metric, Question

log = logging.getLogger(__name__)


def asked_of(
    scorer: Metric,
    chosen: pa.Table,
    rows: list[TokenRow],
    stops: list[int],
    tokenizer: Any,
    conversations: Path | None,
) -> dict[int, Asked]:
    """What is wanted of the rows that the metric asks and that have a prompt, by their place among `chosen`."""
    known = _conversations(conversations, chosen["row_id"]) if scorer.wants_conversation and conversations else {}
    found: dict[int, Asked] = {}
    num_unknown = 0
    for number, answer in enumerate(chosen["answer"].to_pylist()):
        row_id, row = chosen["row_id"][number].as_py(), rows[number]
        target = tokenizer.decode(without_stop(trained_turn(row), stops), skip_special_tokens=False)
        try:
            asked = scorer.ask(Question(row_id, answer, strip_thinking(target), known.get(row_id)))
        except ValueError as error:
            raise ValueError(f"row {row_id}: {error}") from error
        if asked is not None and len(served_prompt(row)):
            found[number] = asked
        num_unknown += asked is not None and number not in found
    if num_unknown:
        log.warning(
            "not_asked=%d rows are trained from their first token: where the prompt ends is unknown", num_unknown
        )
    if not found and not num_unknown and scorer.name != DEFAULT:
        raise ValueError(
            f"the metric {scorer.name} finds nothing to ask in the task's {len(rows)} report rows: none has an answer"
            + (
                ", and no last turn calls a tool between <tool_call> or <code> tags"
                if scorer.name == "tool_call"
                else ""
            )
        )
    return found


def _conversations(folder: Path, row_ids: pa.ChunkedArray) -> dict[str, dict[str, Any]]:
    """The canonical conversations of rows, by row id."""
    table = pq.read_table(folder / "conversations.parquet", columns=["row_id", "conversation"])
    table = table.filter(pc.is_in(table["row_id"], value_set=row_ids.combine_chunks()))
    pairs = zip(table["row_id"].to_pylist(), table["conversation"].to_pylist(), strict=True)
    return {row_id: json.loads(text) for row_id, text in pairs}


@dataclasses.dataclass(frozen=True)
class Output:
    text: str
    num_tokens: int
    cut_off: bool


class Engine(Protocol):
    """What answers prompts."""

    @property
    def name(self) -> str:
        """With its version, once it has answered."""

    def write(
        self,
        prompts: list[np.ndarray],
        keys: list[int],
        sampling: dict[str, Any] | None,
        *,
        stop_ids: list[int],
        max_new_tokens: int,
    ) -> list[np.ndarray]:
        """New tokens, int64, up to and with the stop token: of each prompt's samples, prompt after prompt.

        prompts: int32, shape (tokens,) each. keys: what a prompt's draws hang on, besides the seed. sampling: a
        recipe's evaluation.sampling; None for the likeliest token each time.
        """


def generate_outputs(
    engine: Engine,
    tokenizer: Any,
    stops: list[int],
    prompts: dict[int, np.ndarray],
    keys: dict[int, int],
    sampling: dict[str, Any] | None,
    max_new_tokens: int,
) -> dict[int, list[Output]]:
    """The answers to each prompt, one a sample. keys: what a prompt's draws hang on, besides the seed."""
    drawn_by = [keys[number] for number in prompts] if sampling else []
    generated = engine.write(list(prompts.values()), drawn_by, sampling, stop_ids=stops, max_new_tokens=max_new_tokens)
    num_samples = sampling["num_samples"] if sampling else 1
    outputs: dict[int, list[Output]] = {number: [] for number in prompts}
    for place, ids in enumerate(generated):
        kept = without_stop(ids, stops)
        text = tokenizer.decode(kept, skip_special_tokens=False)
        outputs[list(prompts)[place // num_samples]].append(Output(text, len(ids), len(kept) == len(ids)))
    return outputs


def stop_ids(model: Any) -> list[int]:
    stop = model.generation_config.eos_token_id
    return stop if isinstance(stop, list) else [stop]


def without_stop(ids: np.ndarray, stops: list[int]) -> np.ndarray:
    return ids[:-1] if len(ids) and int(ids[-1]) in stops else ids


def trained_turn(row: TokenRow) -> np.ndarray:
    """The ids of the last trained turn, its stop token with them. int32, shape (tokens,)."""
    after = row.input_ids[len(served_prompt(row)) :], row.trained[len(served_prompt(row)) :]
    ends = np.flatnonzero(after[1] == 0)
    return after[0][: ends[0]] if len(ends) else after[0]


def served_prompt(row: TokenRow) -> np.ndarray:
    """The ids before the last trained turn: what a server would be sent. int32, shape (tokens,).

    Empty when the whole row is trained: where its prompt ends is not known then.
    """
    starts = np.flatnonzero(np.diff(row.trained.astype(np.int8), prepend=0) == 1)
    assert len(starts), "a report row has trained tokens"
    return row.input_ids[: starts[-1]]
