"""The mixture: an index of the rows to train on, and how often. It never copies tokens.

A weight has the alignment-handbook's meaning: the share of the source's rows that is kept after a seeded shuffle. A
weight over 1 keeps whole copies and a share once more. Shares of trained tokens are in shares.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sft_core.data.mixing.mixture_counts import AMOUNTS, Budget, MixedSource, MixtureCounts, SplitCounts
from sft_core.data.mixing.shares import SourceRequest, draw_tokens, fill, normalised, requested_rows
from sft_core.data.overlap.exclusions import REASONS, left_out
from sft_core.data.shards.token_shards import read_index
from sft_core.data.sources import splits
from sft_core.data.tokens.lengths import by_length
from sft_core.data.tokens.token_counts import EarlierCounts

if TYPE_CHECKING:
    from sft_core.store.stage import Build

log = logging.getLogger(__name__)
MIXTURE = pa.schema(
    [("source", pa.int16()), ("row", pa.int32()), ("num_tokens", pa.int32()), ("num_trained", pa.int32())]
)


def build_mixture(
    build: Build,
    *,
    sources: list[SourceRequest],
    selection_share: float,
    report_share: float,
    seed: int,
    num_trained_tokens: int | None,
    max_repeats: float | None,
) -> dict[str, Any]:
    """Writes mixture.parquet: one row for each training row, shuffled. Raises ValueError when nothing is kept.

    sources: in the recipe's order; the column `source` has their numbers.
    """
    shares = {"selection_share": selection_share, "report_share": report_share}
    available = [read_available(build.inputs, source["name"], **shares) for source in sources]
    kept, counts = choose_rows(
        available, sources, seed=seed, num_trained_tokens=num_trained_tokens, max_repeats=max_repeats
    )
    by_source = {}
    for name, source_counts in counts.sources.items():
        earlier = EarlierCounts.from_json(build.manifests[name]["counts"]["source"])
        by_source[name] = dataclasses.replace(source_counts, rows_read=earlier.rows, rejected=earlier.rejected)
    counts = dataclasses.replace(counts, sources=by_source)
    for warning in warnings(counts):
        log.warning("%s", warning)
    if counts.rows == 0:
        raise ValueError(f"dataset_mixture: keeps 0 rows of {len(sources)} sources; raise a weight or add data")
    parts = [
        np.stack([np.full(len(drawn), number), *(column[drawn] for column in of_source.columns)])
        for number, (of_source, drawn) in enumerate(zip(available, kept, strict=True))
    ]
    mixture = np.concatenate(parts, axis=1)
    order = np.random.default_rng(seed).permutation(mixture.shape[1])
    table = pa.table([pa.array(column[order]) for column in mixture], names=MIXTURE.names).cast(MIXTURE)
    pq.write_table(table, build.out / "mixture.parquet", compression="zstd")
    return counts.to_json()


@dataclasses.dataclass(frozen=True)
class Available:
    """The rows of a source that can be drawn, and counts of its other rows."""

    row: np.ndarray  # int64, shape (available,): numbers of its token rows
    num_tokens: np.ndarray  # shape (available,)
    num_trained: np.ndarray  # shape (available,), each at least 1
    counts: SplitCounts

    @property
    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.row, self.num_tokens, self.num_trained


def read_available(
    inputs: Mapping[str, Path], source: str, *, selection_share: float, report_share: float
) -> Available:
    """The source's rows of the train split that train something and are not excluded. inputs: of the stage."""
    is_filtered = "duplicates" in inputs or f"contaminated:{source}" in inputs
    columns = ["prompt_hash", "num_tokens", "num_trained", *(["row_id"] if is_filtered else [])]
    index = read_index(inputs[source], columns=columns)
    num_tokens, num_trained = (index[name].to_numpy() for name in ("num_tokens", "num_trained"))
    split = splits.assign(index["prompt_hash"].to_numpy(), selection_share=selection_share, report_share=report_share)
    in_train = split == splits.TRAIN
    is_available = in_train & (num_trained > 0)
    reasons = dict.fromkeys(REASONS, 0)
    if is_filtered:
        for reason, is_out in left_out(inputs, source, index["row_id"]).items():
            reasons[reason] = int((is_available & is_out).sum())
            is_available &= ~is_out
    rows = np.flatnonzero(is_available)
    counts = SplitCounts(
        rows=len(index),
        **{name: int((split == value).sum()) for value, name in enumerate(splits.NAMES)},
        without_trained_token=int((in_train & (num_trained == 0)).sum()),
        **reasons,
        available=len(rows),
    )
    return Available(rows, num_tokens[rows], num_trained[rows], counts)


def choose_rows(
    available: list[Available],
    sources: list[SourceRequest],
    *,
    seed: int,
    num_trained_tokens: int | None,
    max_repeats: float | None,
) -> tuple[list[np.ndarray], MixtureCounts]:
    """For each source the indices into its available rows that are kept, and the mixture's counts. Pure."""
    held = np.array([rows.num_trained.sum() for rows in available], np.float64)
    shares = np.array([source["trained_token_share"] or 0.0 for source in sources])
    by_token = max_repeats is not None
    budget = num_trained_tokens or float(held[shares > 0].sum())
    targets = fill(held, shares, budget, max_repeats or 1.0)
    kept, requested = [], []
    for number, (rows, source) in enumerate(zip(available, sources, strict=True)):
        num_available, rng = len(rows.row), _rng(seed, source)
        if by_token:
            kept.append(draw_tokens(rows.num_trained, targets[number], max_repeats=max_repeats or 1.0, rng=rng))
            tokens = budget * normalised(shares)[number]
            num_requested = tokens / rows.num_trained.mean() if num_available else 0.0
        else:
            kept.append(sample_rows(num_available, weight=source["weight"], num_rows=source["num_rows"], rng=rng))
            num_requested = requested_rows(source, num_available)
        means = [column.mean() if num_available else 0.0 for column in (rows.num_tokens, rows.num_trained)]
        requested.append([num_requested, *(num_requested * mean for mean in means)])
    counts = _counts(available, sources, kept, np.array(requested, np.float64))
    if max_repeats is not None:
        is_held = targets < budget * normalised(shares) - 0.5
        reached = Budget(
            num_trained_tokens=int(budget),
            within_reach=round(float(targets.sum())),
            max_repeats=max_repeats,
            held_at_max_repeats=[sources[number]["name"] for number in np.flatnonzero(is_held)],
        )
        counts = dataclasses.replace(counts, budget=reached)
    return kept, counts


def _counts(
    available: list[Available], sources: list[SourceRequest], kept: list[np.ndarray], requested: np.ndarray
) -> MixtureCounts:
    """requested: rows, tokens and trained tokens of each source, shape (sources, 3)."""
    drawn = [
        (len(places), int(rows.num_tokens[places].sum()), int(rows.num_trained[places].sum()))
        for rows, places in zip(available, kept, strict=True)
    ]
    requested_shares, achieved_shares = (
        np.stack([normalised(column) for column in amounts.T], axis=1) for amounts in (requested, np.array(drawn))
    )
    by_source = {}
    for number, source in enumerate(sources):
        num_held = int(available[number].num_trained.sum())
        by_source[source["name"]] = MixedSource(
            **available[number].counts.to_json(),
            weight=source["weight"],
            num_rows=source["num_rows"],
            trained_token_share=source["trained_token_share"],
            kept=drawn[number][0],
            tokens=drawn[number][1],
            trained_tokens=drawn[number][2],
            rows_by_tokens=by_length(available[number].num_tokens[kept[number]]),
            rows_by_trained_tokens=by_length(available[number].num_trained[kept[number]]),
            repeats=drawn[number][2] / num_held if num_held else 0.0,
            requested=dict(zip(AMOUNTS, requested_shares[number].tolist(), strict=True)),
            achieved=dict(zip(AMOUNTS, achieved_shares[number].tolist(), strict=True)),
        )
    rows, tokens, trained_tokens = (sum(column) for column in zip(*drawn, strict=True))
    return MixtureCounts(rows=rows, tokens=tokens, trained_tokens=trained_tokens, sources=by_source)


def warnings(counts: MixtureCounts) -> list[str]:
    """A line for each way in which the mixture differs from the recipe, or looks like a mistake."""
    lines = []
    budget = counts.budget
    for name, source in counts.sources.items():
        is_asked = source.trained_token_share != 0 if budget else source.weight != 0
        if source.kept == 0 and is_asked:
            remedy = "add data" if budget else "raise its weight"
            lines.append(f"source={name} keeps 0 of {source.available} training rows; {remedy}")
        elif budget and name in budget.held_at_max_repeats:
            requested, achieved = (f"{share:.1%}" for share in source.share("trained_tokens"))
            cap = f"is held at max_repeats {budget.max_repeats:g}"
            lines.append(f"source={name} {cap}: {achieved} of trained tokens instead of {requested}")
    if budget and budget.within_reach < budget.num_trained_tokens:
        lines.append(
            f"dataset_mixture.num_trained_tokens: found {budget.num_trained_tokens}; at max_repeats "
            f"{budget.max_repeats:g} the sources give {budget.within_reach}; add data or raise max_repeats"
        )
    return lines


def sample_rows(
    num_available: int, *, weight: float | None, num_rows: int | None, rng: np.random.Generator
) -> np.ndarray:
    """Indices into the available rows: int64, shape (kept,). No row comes more often than any other by more than one.

    With a weight, int(num_available * weight) of them; with num_rows, exactly that many (none of an empty source).
    """
    if num_rows is not None:
        count = num_rows if num_available else 0
    else:
        count = int(num_available * (1.0 if weight is None else weight))
    copies, rest = divmod(count, num_available) if num_available else (0, 0)
    whole = [rng.permutation(num_available) for _ in range(copies)]
    return np.concatenate([*whole, rng.permutation(num_available)[:rest]]).astype(np.int64)


def _rng(seed: int, source: SourceRequest) -> np.random.Generator:
    """Seeded by the source's name too, so that another source in the recipe changes no other's rows."""
    name = int.from_bytes(hashlib.sha256(source["name"].encode()).digest()[:8], "big")
    return np.random.default_rng([seed, name])
