"""The mixture: which row of which source is trained on, and how often. An index, never a copy of tokens.

Weights have the alignment-handbook's meaning: a share of the source's rows, kept after a seeded shuffle.
Over 1, whole copies are kept and a share once more.
"""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sft_core.data import splits
from sft_core.data.shards import read_index

if TYPE_CHECKING:
    from sft_core.store import Build

log = logging.getLogger(__name__)
MIXTURE = pa.schema(
    [("source", pa.int16()), ("row", pa.int32()), ("num_tokens", pa.int32()), ("num_trained", pa.int32())]
)


def build_mixture(
    build: Build,
    *,
    sources: list[dict[str, Any]],
    selection_share: float,
    report_share: float,
    seed: int,
) -> dict[str, Any]:
    """Writes mixture.parquet: one row for each training row, shuffled. Raises ValueError when nothing is kept.

    sources: {name, weight, num_rows} each, in the recipe's order, which is what `source` counts.
    """
    parts, counts = [], {}
    for number, source in enumerate(sources):
        index = read_index(build.inputs[source["name"]])
        num_tokens, num_trained = (index[name].to_numpy() for name in ("num_tokens", "num_trained"))
        split = splits.assign(
            index["prompt_hash"].to_numpy(), selection_share=selection_share, report_share=report_share
        )
        in_train = split == splits.TRAIN
        candidates = np.flatnonzero(in_train & (num_trained > 0))
        kept = candidates[
            sample_rows(len(candidates), weight=source["weight"], num_rows=source["num_rows"], rng=_rng(seed, source))
        ]
        if len(kept) == 0 and source["weight"] != 0:
            log.warning("source=%s keeps 0 of %d training rows; raise its weight", source["name"], len(candidates))
        counts[source["name"]] = {
            "rows": len(index),
            **{name: int((split == value).sum()) for value, name in enumerate(splits.NAMES)},
            "without_trained_token": int((in_train & (num_trained == 0)).sum()),
            "weight": source["weight"],
            "num_rows": source["num_rows"],
            "kept": len(kept),
            "tokens": int(num_tokens[kept].sum()),
            "trained_tokens": int(num_trained[kept].sum()),
        }
        parts.append(np.stack([np.full(len(kept), number), kept, num_tokens[kept], num_trained[kept]]))
    mixture = np.concatenate(parts, axis=1)
    if mixture.shape[1] == 0:
        raise ValueError(f"dataset_mixture: keeps 0 rows of {len(sources)} sources; raise a weight or add data")
    order = np.random.default_rng(seed).permutation(mixture.shape[1])
    table = pa.table([pa.array(column[order]) for column in mixture], names=MIXTURE.names).cast(MIXTURE)
    pq.write_table(table, build.out / "mixture.parquet", compression="zstd")
    return {"rows": len(table), "tokens": int(mixture[2].sum()), "sources": counts}


def sample_rows(
    num_available: int, *, weight: float | None, num_rows: int | None, rng: np.random.Generator
) -> np.ndarray:
    """Indices into the available rows: int64, shape (kept,), every row at most once more often than any other.

    With a weight, int(num_available * weight) of them; with num_rows, exactly that many (none of an empty source).
    """
    if num_rows is not None:
        count = num_rows if num_available else 0
    else:
        count = int(num_available * (1.0 if weight is None else weight))
    copies, rest = divmod(count, num_available) if num_available else (0, 0)
    whole = [rng.permutation(num_available) for _ in range(copies)]
    return np.concatenate([*whole, rng.permutation(num_available)[:rest]]).astype(np.int64)


def _rng(seed: int, source: dict[str, Any]) -> np.random.Generator:
    """By the source's name, so that one more source leaves the others' rows as they are."""
    name = int.from_bytes(hashlib.sha256(source["name"].encode()).digest()[:8], "big")
    return np.random.default_rng([seed, name])
