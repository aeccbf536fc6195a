"""Training rows that repeat an earlier row. The first row, in the order of sources and then of rows, is kept.

Invariant: every row that is left out equals a kept row, or its similarity to one is verified to reach the threshold.

Exact duplicates have the same turns, apart from white space and Unicode form. Near duplicates are similar in each of
three sides: context (system, tools), prompt (user, tool results) and answer (reasoning, content, calls). So rows that
share a long prompt are no duplicates where their answers differ, nor are rows with equal answers to other questions,
nor a row and its thinking twin. Similarity is the Jaccard index of sets of word n-grams. MinHash signatures give
candidates (Lee et al. 2022, Deduplicating Training Data Makes Language Models Better, section 4.2), and each candidate
is verified on its text.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from sft_core.counts import Counts
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
        ("similarity", pa.float32()),  # verified: the lowest of context, prompt and answer; 1 where exact
    ]
)
NUM_EXAMPLES = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceDuplicates(Counts):
    rows: int  # of the train split
    exact: int
    near: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DuplicatePair(Counts):
    """Rows of one source that repeat rows of another, or of the same."""

    source: str
    of: str
    kind: str  # exact or near
    rows: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DuplicateRow(Counts):
    """A row that is left out, beside the row that it repeats."""

    source: str
    row_id: str
    of_source: str
    of_row_id: str
    kind: str
    estimated: float
    similarity: float
    text: str  # shortened
    of_text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class DuplicateCounts(Counts):
    rows: int  # of the train split
    exact: int
    near: int
    sources: dict[str, SourceDuplicates]
    pairs: list[DuplicatePair]
    not_compared_with_all: int = 0  # rows that too many rows resemble
    examples: list[DuplicateRow] = dataclasses.field(default_factory=list)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        parts = {
            "sources": {name: SourceDuplicates.from_json(counts) for name, counts in values["sources"].items()},
            "pairs": [DuplicatePair.from_json(pair) for pair in values["pairs"]],
            "examples": [DuplicateRow.from_json(example) for example in values.get("examples", ())],
        }
        return super().from_json({**values, **parts})


@dataclasses.dataclass(frozen=True)
class Match:
    """The kept row that a row duplicates, and how similar they are."""

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

    sources: the trained sources, in the recipe's order. ngram: None looks for exact duplicates only.
    """
    rows = _training_rows(build, sources, selection_share=selection_share, report_share=report_share)
    _, first, group = np.unique(rows.exact, return_index=True, return_inverse=True)
    same_as = first[group]  # for each row the first equal row
    near: dict[int, Match] = {}
    num_cut = 0
    if ngram is not None and threshold is not None and len(rows):
        near, num_cut = _near(build, sources, rows.take(np.unique(same_as)), ngram, threshold)
    matches = {}
    for row in np.flatnonzero(same_as != np.arange(len(rows))).tolist():
        # A row that equals a near duplicate is a near duplicate of the same kept row.
        matches[row] = near.get(int(same_as[row])) or Match(int(same_as[row]), 1.0, 1.0, "exact")
    matches = dict(sorted((matches | near).items()))
    table = _table(sources, rows, matches)
    pq.write_table(table, build.out / "duplicates.parquet", compression="zstd")
    if num_cut:
        log.warning("duplicates: rows_not_compared_with_all=%d too many rows look like them", num_cut)
    return dataclasses.replace(
        _counts(sources, rows, table),
        not_compared_with_all=num_cut,
        examples=_examples(build, sources, rows, matches, table),
    ).to_json()


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Conversations of the train split, in the order in which the first of equals is kept."""

    number: np.ndarray  # int64, shape (rows,): the row's number among all rows of the train split
    source: np.ndarray  # int16, shape (rows,): number of the source
    place: np.ndarray  # int32, shape (rows,): its number among the source's conversations
    exact: np.ndarray  # uint64, shape (rows,)
    row_id: pa.ChunkedArray

    def __len__(self) -> int:
        return len(self.number)

    def take(self, chosen: np.ndarray) -> _Rows:
        number, source, place, exact = (c[chosen] for c in (self.number, self.source, self.place, self.exact))
        return _Rows(number, source, place, exact, self.row_id.take(chosen))


def _training_rows(build: Build, sources: list[str], **shares: float) -> _Rows:
    """The rows that can be kept: a row that is held out, was rejected or trains nothing must not displace another."""
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
    """Near duplicates by number among `rows`, none of which are equal, and how many rows were not compared with all."""
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
        of_source, start = np.flatnonzero(rows.source == number), 0
        for folder in shard_folders(build.inputs[f"signatures:{name}"]):
            files.append(np.load(folder / "minhash.npy", mmap_mode="r"))
            places = rows.place[of_source]
            inside = of_source[(places >= start) & (places < start + len(files[-1]))]
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
            chosen = np.flatnonzero(is_involved & (rows.source == number))
            for first, conversations in read_places(build.inputs[f"conversations:{name}"], rows.place[chosen]):
                sets = gram_sets(list(map(turns, conversations)), ngram)
                yield from zip(chosen[first : first + len(sets)].tolist(), sets, strict=True)
                progress.update(len(sets))


def verified(
    sets: Iterable[tuple[int, np.ndarray]], candidates: Candidates, known: Signatures, threshold: float
) -> Iterator[tuple[int, Match]]:
    """The near duplicates of kept rows, verified by their n-grams.

    sets: the n-grams of every row that has or is a candidate, in order. A candidate that is left out is replaced by the
    row that it repeats, since similarity is not transitive. Memory: 4 bytes for each n-gram of a kept row that is still
    to be compared with a later row.
    """
    last_use = np.full(len(candidates.of), -1, np.int32)
    for column in candidates.of.T:
        has = np.flatnonzero(column >= 0)
        np.maximum.at(last_use, column[has], has.astype(np.int32))
    kept: dict[int, np.ndarray] = {}
    repeats: dict[int, int] = {}  # for a row that is left out, the kept row
    for row, grams in sets:
        pairs = zip(candidates.of[row].tolist(), candidates.estimate[row].tolist(), strict=True)
        estimates = {other: estimate for other, estimate in pairs if other >= 0}
        match = None
        for other in dict.fromkeys(repeats.get(other, other) for other in estimates):
            if (verified_similarity := similarity(grams, kept[other])) >= threshold:
                estimate = estimates.get(other)
                estimate = known.estimate(row, other) if estimate is None else estimate
                match = Match(other, estimate, verified_similarity)
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


def _counts(sources: list[str], rows: _Rows, table: pa.Table) -> DuplicateCounts:
    keys = ["source", "of_source", "kind"]
    groups = table.group_by(keys, use_threads=False).aggregate([([], "count_all")]).to_pylist()
    pairs = [
        DuplicatePair(source=group["source"], of=group["of_source"], kind=group["kind"], rows=group["count_all"])
        for group in groups
    ]

    def count(kind: str, source: str) -> int:
        return sum(pair.rows for pair in pairs if (pair.kind, pair.source) == (kind, source))

    by_source = {
        name: SourceDuplicates(
            rows=int((rows.source == number).sum()), exact=count("exact", name), near=count("near", name)
        )
        for number, name in enumerate(sources)
    }
    order = {name: number for number, name in enumerate(sources)}
    return DuplicateCounts(
        rows=sum(counts.rows for counts in by_source.values()),
        exact=sum(counts.exact for counts in by_source.values()),
        near=sum(counts.near for counts in by_source.values()),
        sources=by_source,
        pairs=sorted(pairs, key=lambda pair: (order[pair.source], order[pair.of], pair.kind)),
    )


def _examples(
    build: Build, sources: list[str], rows: _Rows, matches: dict[int, Match], table: pa.Table
) -> list[DuplicateRow]:
    """Some rows that are left out; near duplicates come first, since those need a look."""

    def text(row: int) -> str:
        folder = build.inputs[f"conversations:{sources[rows.source[row]]}"]
        [(_, [conversation])] = read_places(folder, rows.place[[row]])
        return excerpt(turns(conversation))

    numbered = sorted(enumerate(matches.items()), key=lambda entry: entry[1][1].kind == "exact")[:NUM_EXAMPLES]
    return [
        DuplicateRow(**table.slice(number, 1).to_pylist()[0], text=text(row), of_text=text(match.of))
        for number, (row, match) in numbered
    ]
