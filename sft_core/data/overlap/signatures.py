"""Signatures of conversations: a digest of the turns, and a MinHash signature of the n-grams of words.

Each source has signatures of its own, so that another source in the recipe signs only its own rows.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sft_core.counts import Counts
from sft_core.data.overlap.minhash import sign
from sft_core.data.overlap.stored_rows import count_row_groups, read_groups
from sft_core.data.overlap.words import SETTINGS, SIDES, Turn, exact_digest, hash_turns, ngrams, turns, words
from sft_core.data.shards.parallel import Shard, Tally, Work, build_shards, plan_shards, total

if TYPE_CHECKING:
    from sft_core.store.stage import Build


@dataclasses.dataclass(frozen=True, kw_only=True)
class SignatureCounts(Counts):
    rows: int


def build_signatures(build: Build, *, ngram: int | None, num_permutations: int | None) -> dict[str, Any]:
    """Writes shards of exact.npy and, unless ngram is None, minhash.npy: a row for each conversation.

    exact: uint64, shape (rows,). minhash: uint32, shape (rows, permutations).
    """
    folder = build.inputs["conversations"]
    shards = plan_shards(count_row_groups(folder))
    work = functools.partial(_prepare_work, folder, ngram, num_permutations)
    tallies = build_shards(build.out, shards, work, runtime=build.runtime, desc="signatures")
    return SignatureCounts(**total(tallies)).to_json()


def _prepare_work(folder: Path, ngram: int | None, num_permutations: int | None) -> Work:
    if ngram is not None:
        import datasketch  # noqa: F401  # import before the workers fork: it takes half a second
    return functools.partial(_sign_shard, folder, ngram, num_permutations)


def _sign_shard(folder: Path, ngram: int | None, num_permutations: int | None, shard: Shard, out: Path) -> Tally:
    exact: list[int] = []
    minhash = []
    for conversations, _ in read_groups(folder, shard.first_group, shard.end_group):
        rows = list(map(turns, conversations))
        exact += map(exact_digest, rows)
        if ngram is not None and num_permutations is not None:
            # Leave out settings: they take few values, so that rows without other likeness would share buckets.
            sets = [grams[grams & 3 != SETTINGS] for grams in gram_sets(rows, ngram)]
            minhash.append(sign(sets, num_permutations))
    np.save(out / "exact.npy", np.array(exact, np.uint64))
    if minhash:
        np.save(out / "minhash.npy", np.concatenate(minhash))
    return {"rows": len(exact)}


def gram_sets(rows: list[list[Turn]], n: int) -> list[np.ndarray]:
    """The set of n-grams of each row: sorted uint32, with the side of the row in the lowest two bits."""
    sides = np.array([SIDES[turn.role] for row in rows for turn in row], np.uint64)
    hashed = hash_turns([words(turn.text) for row in rows for turn in row])
    grams = ngrams(hashed, n)
    side = np.repeat(sides, hashed.lengths)[grams.starts]
    values = ((grams.hashes >> np.uint64(32)) & ~np.uint64(3) | side).astype(np.uint32)
    num_turns = np.cumsum([0, *map(len, rows)])
    ends = np.concatenate([[0], np.cumsum(hashed.lengths)])[num_turns]  # words before each row
    return [np.unique(of_row) for of_row in np.split(values, np.searchsorted(grams.starts, ends[1:-1]))]


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """The lowest Jaccard index of two rows' sides; a side that both lack does not count. a, b: sets of gram_sets."""
    common = np.bincount(np.intersect1d(a, b, assume_unique=True) & 3, minlength=4)
    either = np.bincount(a & 3, minlength=4) + np.bincount(b & 3, minlength=4) - common
    return float((common[either > 0] / either[either > 0]).min(initial=1.0))
