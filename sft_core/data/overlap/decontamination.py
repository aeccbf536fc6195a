"""Which training rows hold a question that the model is scored on.

Method: Lambert et al. 2024 (Tulu 3), section 3.2: words are compared, without case and punctuation, by n-grams; a
training row is contaminated by a report prompt when n-grams that both hold cover at least a threshold's share of the
prompt's words. All of a row's text is looked at, for a question that is quoted in an answer, in reasoning or by a tool
is learned as well. What we add: the tasks are sources of ours, so their prompts share wording with rows that are
trained on. An n-gram that many prompts of a task hold is the task's wording and tells no question, so neither it nor
the words that it covers count (common_share; 1 counts everything, as Tulu 3 does).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sft_core.data.overlap.stored_rows import count_row_groups, read_column, read_groups, read_places
from sft_core.data.overlap.words import HashedTurns, excerpt, folded_words, hash_turns, ngrams, turns
from sft_core.data.shards.parallel import Shard, build_shards, plan_shards, shard_folders, total
from sft_core.data.sources import splits

if TYPE_CHECKING:
    from sft_core.store.stage import Build

CONTAMINATION = pa.schema(
    [
        ("row_id", pa.string()),  # of the training row
        ("task", pa.string()),
        ("report_row_id", pa.string()),  # of the prompt that is covered most
        ("coverage", pa.float32()),
        ("ngram", pa.string()),  # an example of what both hold
        ("num_prompts", pa.int32()),  # of the task that the row contaminates
    ]
)
MIN_INSIDE = 4  # words: a shorter turn, as "Go on.", is looked for as a whole turn, not inside others
MIN_COMMON = 3  # prompts: what fewer hold is not called common, however small the task
NUM_EXAMPLES = 3


def build_contamination(
    build: Build,
    *,
    tasks: list[str],
    ngram: int,
    threshold: float,
    common_share: float,
    selection_share: float,
    report_share: float,
) -> dict[str, Any]:
    """Writes shards of contamination.parquet: a row for each training conversation and task that it contaminates."""
    folder = build.inputs["conversations"]
    prompts = [
        Prompt(task, row["row_id"], [folded_words(text) for text in row["turns"]])
        for task in tasks
        for row in pq.read_table(build.inputs[f"prompts:{task}"] / "prompts.parquet").to_pylist()
    ]
    shares = {"selection_share": selection_share, "report_share": report_share}
    work = functools.partial(_start, folder, prompts, ngram, common_share, threshold, shares)
    shards = plan_shards(count_row_groups(folder))
    counts = total(build_shards(build.out, shards, work, runtime=build.runtime, desc="contamination"))
    return {**counts, "prompts": len(prompts), "examples": _examples(build)}


class Prompt(NamedTuple):
    task: str
    row_id: str
    turns: list[list[str]]  # words


class Match(NamedTuple):
    """How a row's text covers one prompt. ngram: the place of its first word among all prompts' words, and how many."""

    prompt: int
    coverage: float
    ngram: tuple[int, int]


class PromptIndex:
    """The n-grams of prompts, and where in which prompt they stand."""

    def __init__(self, prompts: list[Prompt], n: int, common_share: float):
        self.prompts = prompts
        self.n = n
        of = hash_turns([turn for prompt in prompts for turn in prompt.turns])
        self.words = [word for prompt in prompts for turn in prompt.turns for word in turn]
        num_words = np.array([sum(map(len, prompt.turns)) for prompt in prompts], np.int64)
        self._prompt_of_word = np.repeat(np.arange(len(prompts)), num_words)
        grams = ngrams(of, n)
        ends = np.repeat(np.cumsum(of.lengths), of.lengths)
        lengths = np.minimum(n, ends[grams.starts] - grams.starts)
        is_common = self._common(grams.hashes, self._prompt_of_word[grams.starts], common_share)
        self._is_own = np.ones(len(self.words), bool)
        self._is_own[_places(grams.starts[is_common], lengths[is_common])] = False
        self._num_own = np.bincount(self._prompt_of_word[self._is_own], minlength=len(prompts))
        own = np.flatnonzero(~is_common)
        own = own[np.argsort(grams.hashes[own], kind="stable")]
        self._starts, self._lengths = grams.starts[own], lengths[own]
        self._hashes, self._first = np.unique(grams.hashes[own], return_index=True)
        self._end = np.append(self._first[1:], len(own))
        self._inside = sorted({n, *(int(length) for length in np.unique(self._lengths) if length >= MIN_INSIDE)})

    def _common(self, hashes: np.ndarray, prompt: np.ndarray, common_share: float) -> np.ndarray:
        """Whether so many of the task's prompts hold an n-gram: bool, shape (n-grams,)."""
        names = sorted({one.task for one in self.prompts})
        task = np.array([names.index(one.task) for one in self.prompts], np.int64)
        num_prompts = np.bincount(task, minlength=len(names))
        _, number = np.unique(hashes, return_inverse=True)
        held = np.unique(number * len(self.prompts) + prompt)  # an n-gram and a prompt that holds it, once
        by_task = held // len(self.prompts) * len(names) + task[held % len(self.prompts)]
        found, counts = np.unique(by_task, return_counts=True)
        of = np.searchsorted(found, number * len(names) + task[prompt])
        return (counts[of] >= MIN_COMMON) & (counts[of] > common_share * num_prompts[task[prompt]])

    def match(self, rows: list[list[list[str]]], threshold: float) -> list[list[Match]]:
        """For each row the prompts that it covers by at least the threshold. rows: the words of each turn."""
        hashed = hash_turns([turn for row in rows for turn in row])
        row_of_word = np.repeat(np.arange(len(rows)), np.array([sum(map(len, row)) for row in rows], np.int64))
        hits = np.concatenate([self._hits(hashed, row_of_word, n) for n in self._inside], axis=1)
        found: list[list[Match]] = [[] for _ in rows]
        for row in np.unique(hits[0]).tolist():
            found[row] = self._covered(np.unique(hits[1, hits[0] == row]), threshold)
        return found

    def _hits(self, hashed: HashedTurns, row_of_word: np.ndarray, n: int) -> np.ndarray:
        """Rows, and numbers of the prompts' n-grams that they hold: int64, shape (2, hits)."""
        if not len(self._hashes):
            return np.zeros((2, 0), np.int64)
        grams = ngrams(hashed, n)
        number = np.minimum(np.searchsorted(self._hashes, grams.hashes), len(self._hashes) - 1)
        is_hit = self._hashes[number] == grams.hashes
        return np.stack([row_of_word[grams.starts[is_hit]], number[is_hit]])

    def _covered(self, numbers: np.ndarray, threshold: float) -> list[Match]:
        entries = _places(self._first[numbers], self._end[numbers] - self._first[numbers])
        entries = entries[np.argsort(self._starts[entries], kind="stable")]
        places = np.unique(_places(self._starts[entries], self._lengths[entries]))
        covered = np.bincount(self._prompt_of_word[places[self._is_own[places]]], minlength=len(self.prompts))
        found = np.flatnonzero((covered > 0) & (covered >= threshold * self._num_own))
        examples = {int(self._prompt_of_word[self._starts[entry]]): int(entry) for entry in entries[::-1]}
        return [
            Match(
                prompt,
                float(covered[prompt] / self._num_own[prompt]),
                (int(self._starts[examples[prompt]]), int(self._lengths[examples[prompt]])),
            )
            for prompt in found.tolist()
        ]


def _places(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """All of several ranges, one after another.

    >>> _places(np.array([3, 7]), np.array([2, 1])).tolist()
    [3, 4, 7]
    """
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def _start(
    folder: Path,
    prompts: list[Prompt],
    ngram: int,
    common_share: float,
    threshold: float,
    shares: dict[str, float],
) -> Any:
    return functools.partial(_search_shard, folder, PromptIndex(prompts, ngram, common_share), threshold, shares)


def _search_shard(
    folder: Path, index: PromptIndex, threshold: float, shares: dict[str, float], shard: Shard, out: Path
) -> dict[str, Any]:
    found: list[tuple[Any, ...]] = []
    num_rows = num_contaminated = 0
    for conversations, table in read_groups(folder, shard.first_group, shard.end_group, ("row_id", "prompt_hash")):
        in_train = np.flatnonzero(splits.assign(table["prompt_hash"].to_numpy(), **shares) == splits.TRAIN)
        said = [[folded_words(turn.text) for turn in turns(conversations[row])] for row in in_train]
        for row, matches in zip(in_train, index.match(said, threshold), strict=True):
            found += _by_task(index, table["row_id"][int(row)].as_py(), matches)
            num_contaminated += bool(matches)
        num_rows += len(in_train)
    columns = list(map(list, zip(*found, strict=True))) or [[] for _ in CONTAMINATION.names]
    pq.write_table(pa.table(columns, schema=CONTAMINATION), out / "contamination.parquet", compression="zstd")
    by_task = {task: sum(row[1] == task for row in found) for task in sorted({row[1] for row in found})}
    return {"rows": num_rows, "contaminated": num_contaminated, "tasks": by_task}


def _by_task(index: PromptIndex, row_id: str, matches: list[Match]) -> list[tuple[Any, ...]]:
    """A row of the table for each task: of its prompt that is covered most."""
    tasks = [index.prompts[match.prompt].task for match in matches]
    found = []
    for task in dict.fromkeys(tasks):
        own = [match for match, one in zip(matches, tasks, strict=True) if one == task]
        best = max(own, key=lambda match: match.coverage)
        start, length = best.ngram
        example = " ".join(index.words[start : start + length])
        found.append((row_id, task, index.prompts[best.prompt].row_id, best.coverage, example, len(own)))
    return found


def _examples(build: Build) -> list[dict[str, Any]]:
    """Some rows that are left out, beside the prompt that they hold."""
    tables = [pq.read_table(shard / "contamination.parquet") for shard in shard_folders(build.out)]
    examples = pa.concat_tables(tables).slice(0, NUM_EXAMPLES).to_pylist()
    folder = build.inputs["conversations"]
    row_ids = read_column(folder, "row_id").to_pylist() if examples else []
    for example in examples:
        [(_, [conversation])] = read_places(folder, np.array([row_ids.index(example["row_id"])]))
        example["text"] = excerpt(turns(conversation))
        prompts = pq.read_table(build.inputs[f"prompts:{example['task']}"] / "prompts.parquet").to_pylist()
        asked = next(prompt["turns"] for prompt in prompts if prompt["row_id"] == example["report_row_id"])
        example["prompt"] = " | ".join(asked)[:300]
    return examples
