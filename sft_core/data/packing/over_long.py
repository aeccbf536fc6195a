"""Rows over max_length: dropped, truncated after a whole turn, split at turns, or an error. Each is counted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sft_core.data.shards.token_shards import TokenShards, read_windows

log = logging.getLogger(__name__)


class Documents(NamedTuple):
    """The documents to pack: rows of sources, or the first tokens of rows."""

    source: np.ndarray  # int16, shape (documents,)
    row: np.ndarray  # int64, shape (documents,): windows are numbered after the source's rows
    num_tokens: np.ndarray  # int64, shape (documents,)


class OverLongCounts(NamedTuple):
    """Over-long rows of each source by what happened to them, and the windows of those that are split."""

    dropped: dict[str, int]
    truncated: dict[str, int]
    split: dict[str, int]
    windows: dict[str, int]


class Fitted(NamedTuple):
    documents: Documents
    counts: OverLongCounts


def windows_of(source: str) -> str:
    """The name of a source's windows among the inputs. No source has this name, since names have no spaces."""
    return f"windows of {source}"


def fit(
    documents: Documents,
    inputs: Mapping[str, Path],
    *,
    sources: list[str],
    max_length: int,
    over_long: str,
    whole_turns: bool,
) -> Fitted:
    """The documents in their order, none over max_length. whole_turns: a truncated row ends with a turn.

    Raises ValueError for an over-long row under the policy `error`, and when nothing is left.
    """
    too_long = np.flatnonzero(documents.num_tokens > max_length)
    if over_long == "error" and len(too_long):
        raise ValueError(_describe(documents, too_long, sources, max_length))
    if over_long == "truncate":
        stand_ins = _truncate(documents, too_long, inputs, sources, max_length, whole_turns)
    elif over_long == "split":
        stand_ins = _split(documents, too_long, inputs, sources)
    else:
        stand_ins = _StandIns(*(np.zeros(0, dtype=np.int64) for _ in range(3)))
    fits = np.flatnonzero(documents.num_tokens <= max_length)
    of = np.concatenate([fits, stand_ins.of])
    if len(of) == 0:
        shortest = int(documents.num_tokens.min())
        raise ValueError(
            f"packing.max_length: found {max_length}; no row is left (the shortest has {shortest} tokens); raise it"
        )
    order = np.argsort(of, kind="stable")
    rows, lengths = (
        np.concatenate([whole[fits], part])
        for whole, part in ((documents.row, stand_ins.row), (documents.num_tokens, stand_ins.num_tokens))
    )
    lost, kept = np.setdiff1d(too_long, stand_ins.of), np.unique(stand_ins.of)
    kept_by_source = _by_source(documents.source[kept], sources)
    counts = OverLongCounts(
        dropped=_by_source(documents.source[lost], sources),
        truncated=kept_by_source if over_long == "truncate" else {},
        split=kept_by_source if over_long == "split" else {},
        windows=_by_source(documents.source[stand_ins.of], sources) if over_long == "split" else {},
    )
    if len(too_long):
        log.warning("over_long=%s rows=%d dropped=%d max_length=%d", over_long, len(too_long), len(lost), max_length)
    return Fitted(Documents(documents.source[of[order]], rows[order], lengths[order]), counts)


class _StandIns(NamedTuple):
    """The documents that are packed in place of over-long ones."""

    of: np.ndarray  # index of the over-long document that it replaces (may repeat)
    row: np.ndarray
    num_tokens: np.ndarray


def _truncate(
    documents: Documents,
    too_long: np.ndarray,
    inputs: Mapping[str, Path],
    sources: list[str],
    max_length: int,
    whole_turns: bool,
) -> _StandIns:
    shards = {number: TokenShards(inputs[sources[number]]) for number in np.unique(documents.source[too_long])}
    lengths = np.zeros(len(too_long), dtype=np.int64)
    for place, document in enumerate(too_long):
        trained = shards[documents.source[document]][int(documents.row[document])].trained
        lengths[place] = truncated_length(trained, max_length, whole_turns=whole_turns)
    some = lengths > 0
    return _StandIns(too_long[some], documents.row[too_long[some]], lengths[some])


def truncated_length(trained: np.ndarray, max_length: int, *, whole_turns: bool) -> int:
    """Tokens kept of an over-long row: up to the end of the last trained turn that fits, 0 when none does.

    A turn cut in two would teach not to stop. Raw text has no turns: it is cut at max_length.
    """
    if not whole_turns:
        return max_length
    ends = np.flatnonzero(np.diff(trained[: max_length + 1].astype(np.int8)) == -1) + 1
    return int(ends[-1]) if len(ends) else 0


def _split(documents: Documents, too_long: np.ndarray, inputs: Mapping[str, Path], sources: list[str]) -> _StandIns:
    parts = []
    for number in np.unique(documents.source[too_long]):
        tokens, folder = inputs[sources[number]], inputs[windows_of(sources[number])]
        windows = read_windows(tokens, folder)
        of_source = too_long[documents.source[too_long] == number]
        first, last = (
            np.searchsorted(windows.of_row, documents.row[of_source], side=side) for side in ("left", "right")
        )
        of = np.repeat(of_source, last - first)
        window = np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])
        parts.append((of, len(TokenShards(tokens)) + window, windows.num_tokens[window]))
    empty = [(np.zeros(0, dtype=np.int64),) * 3]
    return _StandIns(*(np.concatenate(column).astype(np.int64) for column in zip(*(parts or empty), strict=True)))


def _by_source(numbers: np.ndarray, sources: list[str]) -> dict[str, int]:
    counts = np.bincount(numbers, minlength=len(sources)).tolist()
    return {name: count for name, count in zip(sources, counts, strict=True) if count}


def _describe(documents: Documents, too_long: np.ndarray, sources: list[str], max_length: int) -> str:
    worst = too_long[np.argmax(documents.num_tokens[too_long])]
    where = f"source {sources[documents.source[worst]]}, row {documents.row[worst]}"
    return (
        f"packing.max_length: found {max_length}; {len(too_long)} rows are longer, the longest has "
        f"{documents.num_tokens[worst]} tokens ({where}); "
        "raise it, or set packing.over_long to drop, truncate or split"
    )
