"""First-fit-decreasing packing: each sequence lands in exactly one pack, whole, and no pack is over capacity.

The output is a plan of row numbers in the token shards. Packs come out sorted by the length of their documents, so
training shuffles them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sft_core.data.packing.over_long import Documents, fit
from sft_core.data.packing.pack_counts import PackCounts
from sft_core.data.tokens.lengths import by_length
from sft_core.parquet import read_table

if TYPE_CHECKING:
    from sft_core.store.stage import Build

PLAN = pa.schema([("pack", pa.int32()), ("source", pa.int16()), ("row", pa.int32()), ("num_tokens", pa.int32())])


def build_packs(
    build: Build,
    *,
    sources: list[str],
    packing_strategy: str,
    max_length: int,
    over_long: str,
    loss_scope: str,
    by_source: bool = False,
) -> dict[str, Any]:
    """Writes packs.parquet: one row for each document, sorted by pack. Raises ValueError when no row fits.

    by_source: each pack has rows of one source only.
    """
    mixture = read_table(build.inputs["mixture"] / "mixture.parquet", ["source", "row", "num_tokens"])
    fitted = fit(
        Documents(*(mixture[name].to_numpy() for name in ("source", "row", "num_tokens"))),
        build.inputs,
        sources=sources,
        max_length=max_length,
        over_long=over_long,
        whole_turns=loss_scope != "all",
    )
    source, row, lengths = fitted.documents
    strategies = {"ffd": first_fit_decreasing, "none": lambda lengths, capacity: np.arange(len(lengths))}
    apart = source if by_source else np.zeros_like(source)
    pack, num_packs = np.empty(len(lengths), np.int64), 0
    for number in np.unique(apart):
        pack[apart == number] = num_packs + strategies[packing_strategy](lengths[apart == number], max_length)
        num_packs = int(pack[apart == number].max()) + 1
    write_plan(build.out, pack, source, row, lengths)
    num_tokens = int(lengths.sum())
    tokens_of_packs = np.bincount(pack, weights=lengths).astype(np.int64)
    return PackCounts(
        packs=num_packs,
        documents=len(lengths),
        tokens=num_tokens,
        max_length=max_length,
        fill=round(num_tokens / (num_packs * max_length), 6),
        packs_by_fill=_by_percent(tokens_of_packs, max_length),
        packs_by_documents=by_length(np.bincount(pack)),
        documents_by_tokens=by_length(lengths),
        attention_of_packs=_attention(pack, lengths),
        **fitted.counts._asdict(),
    ).to_json()


def _attention(pack: np.ndarray, lengths: np.ndarray) -> dict[str, int]:
    """Pairs of tokens of which one attends to the other: in the cheapest, the mean and the costliest pack.

    Packs have about the same length and differ in these pairs, which is why ranks need a balance.
    """
    tokens = lengths.astype(np.float64)
    pairs = np.bincount(pack, weights=tokens * (tokens + 1) / 2)
    return {"least": int(pairs.min()), "mean": round(float(pairs.mean())), "most": int(pairs.max())}


def _by_percent(num_tokens: np.ndarray, capacity: int) -> dict[str, int]:
    """Packs by their fill in whole percents of the capacity; 100 is full to the last token."""
    percent, counts = np.unique(num_tokens * 100 // capacity, return_counts=True)
    return {str(value): count for value, count in zip(percent.tolist(), counts.tolist(), strict=True)}


def write_plan(folder: Path, pack: np.ndarray, source: np.ndarray, row: np.ndarray, lengths: np.ndarray) -> int:
    """Writes packs.parquet, sorted by pack. Each array has shape (documents,). Returns the number of packs."""
    order = np.argsort(pack, kind="stable")
    columns = (pack[order], source[order], row[order], lengths[order])
    table = pa.table([pa.array(column) for column in columns], names=PLAN.names).cast(PLAN)
    pq.write_table(table, folder / "packs.parquet", compression="zstd")
    return int(pack.max()) + 1


def first_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The pack of each sequence: int64, shape (sequences,), packs counted from 0.

    Longest first, equals in their given order, each goes into the first pack with room (Johnson 1973: at most
    11/9 of the optimum + 6/9). A max-segment-tree over the packs' free space finds it in O(log packs). Raises
    ValueError for a sequence that is empty or over capacity, and for a capacity beyond 32 bits.
    """
    if not 1 <= capacity <= np.iinfo(np.int32).max:
        raise ValueError(f"capacity: found {capacity}; it is 1 to {np.iinfo(np.int32).max}")
    if len(lengths) and (lengths.min() < 1 or lengths.max() > capacity):
        raise ValueError(f"lengths: found {lengths.min()} to {lengths.max()}; each is 1 to {capacity}")
    from sft_core.data.packing.first_fit import pack_decreasing  # import here: it compiles

    return pack_decreasing(np.ascontiguousarray(lengths, dtype=np.int32), capacity)


@dataclasses.dataclass(frozen=True)
class PackPlan:
    """The documents of each pack: pack p has the entries offsets[p] to offsets[p + 1]."""

    source: np.ndarray  # int16, shape (documents,)
    row: np.ndarray  # int32, shape (documents,)
    num_tokens: np.ndarray  # int32, shape (documents,): the row's first tokens that are used
    offsets: np.ndarray  # int64, shape (packs + 1,)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def read(cls, folder: Path) -> PackPlan:
        table = read_table(folder / "packs.parquet")
        pack = table["pack"].to_numpy()
        offsets = np.searchsorted(pack, np.arange(int(pack[-1]) + 2))
        source, row, num_tokens = (table[name].to_numpy() for name in ("source", "row", "num_tokens"))
        return cls(source, row, num_tokens, offsets)
