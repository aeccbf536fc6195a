"""The questions of a task's report split: what training rows must not hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sft_core.data.overlap.stored_rows import read_column, read_places
from sft_core.data.overlap.words import folded_words, turns
from sft_core.data.sources import splits

if TYPE_CHECKING:
    from sft_core.store.stage import Build

PROMPTS = pa.schema([("row_id", pa.string()), ("turns", pa.list_(pa.string()))])


def build_report_prompts(build: Build, *, selection_share: float, report_share: float) -> dict[str, Any]:
    """Writes prompts.parquet: the turns that ask, of each unique prompt of the report split."""
    folder = build.inputs["conversations"]
    hashes = read_column(folder, "prompt_hash").to_numpy()
    split = splits.assign(hashes, selection_share=selection_share, report_share=report_share)
    held_out = np.flatnonzero(split == splits.REPORT)
    _, first = np.unique(hashes[held_out], return_index=True)
    places = np.sort(held_out[first])
    asked = [questions(conversation) for _, found in read_places(folder, places) for conversation in found]
    table = pa.table([read_column(folder, "row_id").take(places), asked], schema=PROMPTS)
    pq.write_table(table, build.out / "prompts.parquet", compression="zstd")
    return {"prompts": len(table), "without_words": sum(not one for one in asked)}


def questions(conversation: dict[str, Any]) -> list[str]:
    """The user turns; the system turn only where a user says nothing, and the text itself of a raw-text row.

    A system turn that many rows share would make each of them look like the question that stands below it in one,
    and a long one would hide that the same question stands below another.
    """
    said = [turn for turn in turns(conversation) if folded_words(turn.text)]
    by_role = {role: [turn.text for turn in said if turn.role == role] for role in ("text", "user", "system")}
    return by_role["text"] or by_role["user"] or by_role["system"]
