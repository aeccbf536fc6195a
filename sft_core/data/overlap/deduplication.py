"""Which training rows say what an earlier one says: the first in the order of sources, then of rows, is kept.

Invariant: every row that is left out is the same as a row that is kept, or verified to be as similar to one as the
threshold.

Exact duplicates have the same turns but for white space and Unicode form. Near ones are as similar in each of what
the model is told (system, tools), asked (user, tool results) and answers (reasoning, content, calls): a long prompt
that rows share does not make other answers duplicates, nor do equal answers other questions, nor is a twin that
thinks one. Similar is the Jaccard index of sets of word n-grams, of which MinHash signatures give the candidates
(Lee et al. 2022, Deduplicating Training Data Makes Language Models Better, section 4.2); each is verified on its text.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from sft_core.data.overlap.signatures import gram_sets, similarity
from sft_core.data.overlap.stored_rows import read_column, read_places
from sft_core.data.overlap.words import excerpt, turns
from sft_core.data.shards.parallel import shard_folders
from sft_core.data.shards.token_shards import read_index
from sft_core.data.sources import splits

if TYPE_CHECKING:
    from sft_core.data.overlap.candidates import Candidates, Signatures
    from sft_core.store.stage import Build

log = logging.getLogger(__name__)
DUPLICATES = pa.schema(
    [
        ("source", pa.string()),
        ("row_id", pa.string()),
        ("of_source", pa.string()),
        ("of_row_id", pa.string()),
        ("kind", pa.string()),  # exact or near
        ("estimated", pa.float32()),  # by signature, over all of the text; 1 where exact
        ("similarity", pa.float32()),  # verified: the lowest of told, asked and answered; 1 where exact
    ]
)
NUM_EXAMPLES = 5


@dataclasses.dataclass(frozen=True)
class Match:
    """What a row is a duplicate of: a row that is kept."""

    of: int
    estimated: float
    similarity: float
    kind: str = "near"


def build_duplicates(
    build: Build,
    *,
    sources: list[str],
    ngram: int | None,
    threshold: float | None,
    selection_share: float,
    report_share: float,
) -> dict[str, Any]:
    """Writes duplicates.parquet: one row for each training conversation that is left out.

    sources: those that are trained on, in the recipe's order. ngram: None looks for exact duplicates only.
    """
    rows = _training_rows(build, sources, selection_share=selection_share, report_share=report_share)
    _, first, group = np.unique(rows.exact, return_index=True, return_inverse=True)
    same_as = first[group]  # of each row, the first that is the same
    near: dict[int, Match] = {}
    num_cut = 0
    if ngram is not None and threshold is not None and len(rows):
        near, num_cut = _near(build, sources, rows.take(np.unique(same_as)), ngram, threshold)
    matches = {}
    for row in np.flatnonzero(same_as != np.arange(len(rows))).tolist():
        # What is the same as a near duplicate is one too: of the row that is kept.
        matches[row] = near.get(int(same_as[row])) or Match(int(same_as[row]), 1.0, 1.0, "exact")
    matches = dict(sorted((matches | near).items()))
    table = _table(sources, rows, matches)
    pq.write_table(table, build.out / "duplicates.parquet", compression="zstd")
    if num_cut:
        log.warning("duplicates: rows_not_compared_with_all=%d too many rows look like them", num_cut)
    return {
        **_counts(sources, rows, table),
        "not_compared_with_all": num_cut,
        "examples": _examples(build, sources, rows, matches, table),
    }


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Conversations that are trained on, in the order in which the first is kept."""

    number: np.ndarray  # int64, shape (rows,): of the row among all that are trained on
    source: np.ndarray  # int16, shape (rows,): number of the source
    place: np.ndarray  # int32, shape (rows,): the row of the source's conversations
    exact: np.ndarray  # uint64, shape (rows,)
    row_id: pa.ChunkedArray

    def __len__(self) -> int:
        return len(self.number)

    def take(self, chosen: np.ndarray) -> _Rows:
        number, source, place, exact = (c[chosen] for c in (self.number, self.source, self.place, self.exact))
        return _Rows(number, source, place, exact, self.row_id.take(chosen))


def _training_rows(build: Build, sources: list[str], **shares: float) -> _Rows:
    """A row that is held out, was rejected or trains nothing takes no other row's place, so it is not among them."""
    parts: list[tuple[np.ndarray, ...]] = []
    ids: list[pa.Array] = []
    for number, name in enumerate(sources):
        index = read_index(build.inputs[f"tokens:{name}"], columns=["row_id", "prompt_hash", "num_trained"])
        in_train = splits.assign(index["prompt_hash"].to_numpy(), **shares) == splits.TRAIN
        trained = index["row_id"].filter(pa.array(in_train & (index["num_trained"].to_numpy() > 0)))
        row_id = read_column(build.inputs[f"conversations:{name}"], "row_id")
        places = np.flatnonzero(pc.is_in(row_id, value_set=trained.combine_chunks()).to_numpy())
        folders = shard_folders(build.inputs[f"signatures:{name}"])
        exact = np.concatenate([np.load(folder / "exact.npy") for folder in folders])
        parts.append((np.full(len(places), number, np.int16), places.astype(np.int32), exact[places]))
        ids += row_id.take(places).chunks
    source, place, exact = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return _Rows(np.arange(len(source)), source, place, exact, pa.chunked_array(ids, pa.string()))


def _near(build: Build, sources: list[str], rows: _Rows, ngram: int, threshold: float) -> tuple[dict[int, Match], int]:
    """Near duplicates by number, of rows that are not the same; and how many rows were not compared with all."""
    known = _signatures(build, sources, rows)
    candidates = known.candidates(threshold)
    sets = _involved_sets(build, sources, rows, candidates, ngram)
    return {
        int(rows.number[row]): dataclasses.replace(match, of=int(rows.number[match.of]))
        for row, match in verified(sets, candidates, known, threshold)
    }, candidates.num_cut


def _signatures(build: Build, sources: list[str], rows: _Rows) -> Signatures:
    from sft_core.data.overlap.candidates import Signatures  # compiled code, which takes a second to load

    files: list[np.ndarray] = []
    part, place = np.empty(len(rows), np.int32), rows.place.copy()
    for number, name in enumerate(sources):
        own, start = np.flatnonzero(rows.source == number), 0
        for folder in shard_folders(build.inputs[f"signatures:{name}"]):
            files.append(np.load(folder / "minhash.npy", mmap_mode="r"))
            inside = own[(rows.place[own] >= start) & (rows.place[own] < start + len(files[-1]))]
            part[inside], place[inside] = len(files) - 1, rows.place[inside] - start
            start += len(files[-1])
    return Signatures(files, part, place)


def _involved_sets(
    build: Build, sources: list[str], rows: _Rows, candidates: Candidates, ngram: int
) -> Iterator[tuple[int, np.ndarray]]:
    """The n-grams of the rows that have or are a candidate, in order."""
    is_involved = candidates.of[:, 0] >= 0
    is_involved[candidates.of[candidates.of >= 0]] = True
    with tqdm(total=int(is_involved.sum()), unit=" rows", disable=None, desc="duplicates") as progress:
        for number, name in enumerate(sources):
            own = np.flatnonzero(is_involved & (rows.source == number))
            for first, conversations in read_places(build.inputs[f"conversations:{name}"], rows.place[own]):
                sets = gram_sets(list(map(turns, conversations)), ngram)
                yield from zip(own[first : first + len(sets)].tolist(), sets, strict=True)
                progress.update(len(sets))


def verified(
    sets: Iterable[tuple[int, np.ndarray]], candidates: Candidates, known: Signatures, threshold: float
) -> Iterator[tuple[int, Match]]:
    """The rows that are near duplicates of one that is kept, by their n-grams.

    sets: of every row that has or is a candidate, in order. In place of a candidate that is left out itself, the row
    that it repeats is compared: likeness is not passed on. Memory: 4 bytes for each n-gram of a kept row that a later
    one is compared with.
    """
    last_use = np.full(len(candidates.of), -1, np.int32)
    for column in candidates.of.T:
        has = np.flatnonzero(column >= 0)
        np.maximum.at(last_use, column[has], has.astype(np.int32))
    kept: dict[int, np.ndarray] = {}
    repeats: dict[int, int] = {}  # of a row that is left out, the kept one
    for row, grams in sets:
        pairs = zip(candidates.of[row].tolist(), candidates.estimate[row].tolist(), strict=True)
        estimates = {other: estimate for other, estimate in pairs if other >= 0}
        match = None
        for other in dict.fromkeys(repeats.get(other, other) for other in estimates):
            if (found := similarity(grams, kept[other])) >= threshold:
                estimate = estimates.get(other)
                match = Match(other, known.estimate(row, other) if estimate is None else estimate, found)
                break
        if match is not None:
            repeats[row] = match.of
            last_use[match.of] = max(last_use[match.of], last_use[row])
            yield row, match
        elif last_use[row] > row:
            kept[row] = grams
        for other in {repeats.get(other, other) for other in estimates}:
            if last_use[other] <= row:
                kept.pop(other, None)


def _table(sources: list[str], rows: _Rows, matches: dict[int, Match]) -> pa.Table:
    names = np.array(sources, object)
    removed, of = (np.array(list(numbers), np.int64) for numbers in (matches, (m.of for m in matches.values())))
    columns = {
        "source": names[rows.source[removed]],
        "row_id": rows.row_id.take(removed),
        "of_source": names[rows.source[of]],
        "of_row_id": rows.row_id.take(of),
    }
    fields = {name: [getattr(m, name) for m in matches.values()] for name in ("kind", "estimated", "similarity")}
    return pa.table(columns | fields, schema=DUPLICATES)


def _counts(sources: list[str], rows: _Rows, table: pa.Table) -> dict[str, Any]:
    keys = ["source", "of_source", "kind"]
    found = table.group_by(keys, use_threads=False).aggregate([([], "count_all")]).to_pylist()
    pairs = [{"source": row["source"], "of": row["of_source"], "kind": row["kind"]} for row in found]
    pairs = [pair | {"rows": row["count_all"]} for pair, row in zip(pairs, found, strict=True)]

    def count(kind: str, source: str) -> int:
        return sum(pair["rows"] for pair in pairs if (pair["kind"], pair["source"]) == (kind, source))

    by_source = {
        name: {"rows": int((rows.source == number).sum()), "exact": count("exact", name), "near": count("near", name)}
        for number, name in enumerate(sources)
    }
    in_all = {key: sum(one[key] for one in by_source.values()) for key in ("rows", "exact", "near")}
    order = {name: number for number, name in enumerate(sources)}
    return {
        **in_all,
        "sources": by_source,
        "pairs": sorted(pairs, key=lambda pair: (order[pair["source"]], order[pair["of"]], pair["kind"])),
    }


def _examples(
    build: Build, sources: list[str], rows: _Rows, matches: dict[int, Match], table: pa.Table
) -> list[dict[str, Any]]:
    """Some rows that are left out beside what they repeat; near ones first, for those are the ones to look at."""

    def text(row: int) -> str:
        folder = build.inputs[f"conversations:{sources[rows.source[row]]}"]
        [(_, [conversation])] = read_places(folder, rows.place[[row]])
        return excerpt(turns(conversation))

    numbered = sorted(enumerate(matches.items()), key=lambda one: one[1][1].kind == "exact")[:NUM_EXAMPLES]
    return [
        table.slice(number, 1).to_pylist()[0] | {"text": text(row), "of_text": text(match.of)}
        for number, (row, match) in numbered
    ]
