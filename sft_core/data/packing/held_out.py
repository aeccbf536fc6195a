"""Rows that are held out of training: for decisions while it goes on (selection), or for the scores (report)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa

from sft_core.counts import Counts
from sft_core.data.packing.plan import first_fit_decreasing, write_plan
from sft_core.data.shards.token_shards import read_index
from sft_core.data.sources import splits

if TYPE_CHECKING:
    from sft_core.store.stage import Build

log = logging.getLogger(__name__)


def held_out_rows(index: pa.Table, split: int, *, selection_share: float, report_share: float) -> np.ndarray:
    """Row numbers of a split: one for each unique prompt, in the order of prompt hashes.

    The order is the same for every source, so two sources with the same prompts are scored on the same ones.
    """
    hashes = index["prompt_hash"].to_numpy()
    assigned = splits.assign(hashes, selection_share=selection_share, report_share=report_share)
    candidates = np.flatnonzero((assigned == split) & (index["num_trained"].to_numpy() > 0))
    # Of a conversation's rows only the last has the answer: prefer rows with an answer.
    unanswered = index["answer"].is_null().to_numpy()[candidates]
    candidates = candidates[np.argsort(unanswered, kind="stable")]
    _, first = np.unique(hashes[candidates], return_index=True)
    return candidates[first]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectedRows(Counts):
    rows: int
    over_long: int  # left out
    tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionCounts(Counts):
    packs: int
    tokens: int
    sources: dict[str, SelectedRows]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        sources = {name: SelectedRows.from_json(counts) for name, counts in values["sources"].items()}
        return super().from_json({**values, "sources": sources})


def build_selection(
    build: Build,
    *,
    sources: list[str],
    selection_share: float,
    report_share: float,
    max_rows: int,
    max_length: int,
    smoke: bool,
) -> dict[str, Any]:
    """Writes packs.parquet, a plan in the form of packing's, of at most `max_rows` selection rows of each source.

    Rows over `max_length` are left out and counted. smoke: a source without selection rows gives training rows.
    Raises ValueError for a source that has none.
    """
    shares = {"selection_share": selection_share, "report_share": report_share}
    columns: list[np.ndarray] = []
    counts: dict[str, SelectedRows] = {}
    for number, source in enumerate(sources):
        index = read_index(build.inputs[source], columns=["prompt_hash", "answer", "num_tokens", "num_trained"])
        num_tokens = index["num_tokens"].to_numpy()
        candidates = held_out_rows(index, splits.SELECTION, **shares)
        if smoke and len(candidates) == 0:
            log.warning("source=%s no selection row among the first rows: this smoke run takes training rows", source)
            candidates = held_out_rows(index, splits.TRAIN, **shares)
        fits = candidates[num_tokens[candidates] <= max_length]
        rows = fits[:max_rows]
        if len(rows) == 0:
            raise ValueError(
                f"{source} has no selection row of at most {max_length} tokens, and losses on them are asked for; "
                "raise dataset_mixture.selection_share or add data"
            )
        counts[source] = SelectedRows(
            rows=len(rows), over_long=len(candidates) - len(fits), tokens=int(num_tokens[rows].sum())
        )
        columns.append(np.stack([np.full(len(rows), number), rows, num_tokens[rows]]))
    source_column, row, lengths = np.concatenate(columns, axis=1)
    num_packs = write_plan(build.out, first_fit_decreasing(lengths, max_length), source_column, row, lengths)
    return SelectionCounts(packs=num_packs, tokens=int(lengths.sum()), sources=counts).to_json()
