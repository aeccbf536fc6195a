"""First-fit-decreasing packing: each sequence lands in exactly one pack, whole, and no pack is over capacity.

The output is a plan of offsets into the token shards. Order within an epoch is not decided here: training
shuffles packs, for packs in the order of their making are sorted by length.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sft_core.data.shards import TokenShards

if TYPE_CHECKING:
    from sft_core.store import Build

log = logging.getLogger(__name__)
PLAN = pa.schema([("pack", pa.int32()), ("source", pa.int16()), ("row", pa.int32()), ("num_tokens", pa.int32())])


def build_packs(
    build: Build,
    *,
    sources: list[str],
    packing_strategy: str,
    max_length: int,
    over_long: str,
    loss_scope: str,
) -> dict[str, Any]:
    """Writes packs.parquet: one row for each document, packs together. Raises ValueError when no row fits."""
    mixture = pq.read_table(build.inputs["mixture"] / "mixture.parquet")
    source, row, lengths = (mixture[name].to_numpy() for name in ("source", "row", "num_tokens"))
    shortest = int(lengths.min())
    lengths = lengths.copy()
    too_long = np.flatnonzero(lengths > max_length)
    if over_long == "error" and len(too_long):
        worst = too_long[np.argmax(lengths[too_long])]
        raise ValueError(
            f"packing.max_length: found {max_length}; {len(too_long)} rows are longer, the longest has "
            f"{lengths[worst]} tokens (source {sources[source[worst]]}, row {row[worst]}); "
            "raise it, or set packing.over_long to drop or truncate"
        )
    if over_long == "truncate":
        shards = {number: TokenShards(build.inputs[sources[number]]) for number in np.unique(source[too_long])}
        for index in too_long:
            trained = shards[source[index]][int(row[index])].trained
            lengths[index] = truncated_length(trained, max_length, whole_turns=loss_scope != "all")
    else:
        lengths[too_long] = 0
    kept = np.flatnonzero(lengths > 0)
    if len(kept) == 0:
        raise ValueError(
            f"packing.max_length: found {max_length}; no row is left (the shortest has {shortest} tokens); raise it"
        )
    strategies = {"ffd": first_fit_decreasing, "none": lambda lengths, capacity: np.arange(len(lengths))}
    pack = strategies[packing_strategy](lengths[kept], max_length)
    order = np.argsort(pack, kind="stable")
    columns = (pack[order], source[kept][order], row[kept][order], lengths[kept][order])
    table = pa.table([pa.array(column) for column in columns], names=PLAN.names).cast(PLAN)
    pq.write_table(table, build.out / "packs.parquet", compression="zstd")
    num_packs, num_tokens = int(pack.max()) + 1, int(lengths[kept].sum())
    truncated = np.intersect1d(too_long, kept)
    dropped = np.setdiff1d(too_long, kept)
    if len(too_long):
        log.warning(
            "over_long=%d dropped=%d truncated=%d max_length=%d",
            len(too_long),
            len(dropped),
            len(truncated),
            max_length,
        )
    return {
        "packs": num_packs,
        "documents": len(kept),
        "tokens": num_tokens,
        "max_length": max_length,
        "fill": round(num_tokens / (num_packs * max_length), 6),
        "dropped": _by_source(source[dropped], sources),
        "truncated": _by_source(source[truncated], sources),
    }


def _by_source(numbers: np.ndarray, sources: list[str]) -> dict[str, int]:
    return {
        name: count
        for name, count in zip(sources, np.bincount(numbers, minlength=len(sources)).tolist(), strict=True)
        if count
    }


def truncated_length(trained: np.ndarray, max_length: int, *, whole_turns: bool) -> int:
    """Tokens kept of an over-long row: up to the end of the last trained turn that fits, 0 when none does.

    A turn cut in two would teach not to stop. Raw text has no turns: it is cut at max_length.
    """
    if not whole_turns:
        return max_length
    ends = np.flatnonzero(np.diff(trained[: max_length + 1].astype(np.int8)) == -1) + 1
    return int(ends[-1]) if len(ends) else 0


def first_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The pack of each sequence: int64, shape (sequences,), packs counted from 0.

    Longest first, each goes into the first pack with room (Johnson 1973: at most 11/9 of the optimum + 6/9).
    A max-segment-tree over the packs' free space finds it in O(log n). Raises ValueError for a sequence that
    is empty or over capacity.
    """
    if len(lengths) and (lengths.min() < 1 or lengths.max() > capacity):
        raise ValueError(f"lengths: found {lengths.min()} to {lengths.max()}; each is 1 to {capacity}")
    from sft_core.data.first_fit import first_fit  # compiles, so only where it is used

    order = np.argsort(-lengths, kind="stable")
    return first_fit(lengths.astype(np.int64), order, capacity)


@dataclasses.dataclass(frozen=True)
class PackPlan:
    """Which documents are in which pack. Pack p holds the entries offsets[p] to offsets[p + 1]."""

    source: np.ndarray  # int16, shape (documents,)
    row: np.ndarray  # int32, shape (documents,)
    num_tokens: np.ndarray  # int32, shape (documents,): the row's first tokens that are used
    offsets: np.ndarray  # int64, shape (packs + 1,)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def read(cls, folder: Path) -> PackPlan:
        table = pq.read_table(folder / "packs.parquet")
        pack = table["pack"].to_numpy()
        offsets = np.searchsorted(pack, np.arange(int(pack[-1]) + 2))
        source, row, num_tokens = (table[name].to_numpy() for name in ("source", "row", "num_tokens"))
        return cls(source, row, num_tokens, offsets)
