"""The questions of a task's report split, which training rows must not contain."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sft_core.counts import Counts
from sft_core.data.overlap.stored_rows import read_column, read_places
from sft_core.data.overlap.words import folded_words, turns
from sft_core.data.sources import splits
from sft_core.data.sources.formats.canonical import Conversation

if TYPE_CHECKING:
    from sft_core.store.stage import Build

PROMPTS = pa.schema([("row_id", pa.string()), ("turns", pa.list_(pa.string()))])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportPromptCounts(Counts):
    prompts: int  # unique
    without_words: int


def build_report_prompts(build: Build, *, selection_share: float, report_share: float) -> dict[str, Any]:
    """Writes prompts.parquet: the questions of each unique prompt of the report split."""
    folder = build.inputs["conversations"]
    hashes = read_column(folder, "prompt_hash").to_numpy()
    split = splits.assign(hashes, selection_share=selection_share, report_share=report_share)
    held_out = np.flatnonzero(split == splits.REPORT)
    _, first = np.unique(hashes[held_out], return_index=True)
    places = np.sort(held_out[first])
    turns_of_prompts = [questions(each) for _, conversations in read_places(folder, places) for each in conversations]
    table = pa.table([read_column(folder, "row_id").take(places), turns_of_prompts], schema=PROMPTS)
    pq.write_table(table, build.out / "prompts.parquet", compression="zstd")
    num_empty = sum(not texts for texts in turns_of_prompts)
    return ReportPromptCounts(prompts=len(table), without_words=num_empty).to_json()


def questions(conversation: Conversation) -> list[str]:
    """The user turns; the system turn if no user turn has words; the text of a raw-text row.

    A system turn that many rows share would make each of them look like the question below it in one row, and a long
    system turn would hide that the same question stands below another.
    """
    said = [turn for turn in turns(conversation) if folded_words(turn.text)]
    by_role = {role: [turn.text for turn in said if turn.role == role] for role in ("text", "user", "system")}
    return by_role["text"] or by_role["user"] or by_role["system"]
