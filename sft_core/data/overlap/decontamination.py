"""Training rows that contain a question that the model is scored on.

Method: Lambert et al. 2024 (Tulu 3), section 3.2: words are compared, without case and punctuation, by n-grams. A
report prompt contaminates a training row when n-grams of both cover at least a threshold's share of the prompt's words.
All text of a row is compared: a question quoted in an answer, in reasoning or by a tool is learned as well. Our
addition: tasks are sources of the mixture, so their prompts share wording with training rows. An n-gram in many prompts
of a task is such wording, so neither it nor the words that it covers count (common_share; 1 counts all, as Tulu 3).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sft_core.counts import Counts
from sft_core.data.overlap.stored_rows import count_row_groups, read_column, read_groups, read_places
from sft_core.data.overlap.words import HashedTurns, excerpt, folded_words, hash_turns, ngrams, turns
from sft_core.data.shards.parallel import Shard, Tally, Work, build_shards, plan_shards, shard_folders, total
from sft_core.data.sources import splits
from sft_core.parquet import read_table

if TYPE_CHECKING:
    from sft_core.store.stage import Build

CONTAMINATION = pa.schema(
    [
        ("row_id", pa.string()),  # of the training row
        ("task", pa.string()),
        ("report_row_id", pa.string()),  # of the prompt with the highest coverage
        ("coverage", pa.float32()),
        ("ngram", pa.string()),  # an example that both contain
        ("num_prompts", pa.int32()),  # prompts of the task that contaminate the row
    ]
)
MIN_INSIDE = 4  # words: a shorter turn, such as "Go on.", matches whole turns alone, never a part of one
MIN_COMMON = 3  # prompts: an n-gram of fewer prompts is not common, however small the task
NUM_EXAMPLES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContaminatedRow(Counts):
    """A row that is left out, beside the prompt that it contains."""

    row_id: str
    task: str
    report_row_id: str
    coverage: float
    ngram: str
    num_prompts: int
    text: str  # of the row, shortened
    prompt: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContaminationCounts(Counts):
    rows: int  # of the train split
    contaminated: int
    tasks: dict[str, int]  # contaminated rows
    prompts: int = 0
    examples: list[ContaminatedRow] = dataclasses.field(default_factory=list)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        examples = [ContaminatedRow.from_json(example) for example in values.get("examples", ())]
        return super().from_json({**values, "examples": examples})


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
        for row in read_table(build.inputs[f"prompts:{task}"] / "prompts.parquet").to_pylist()
    ]
    shares = {"selection_share": selection_share, "report_share": report_share}
    work = functools.partial(_prepare_work, folder, prompts, ngram, common_share, threshold, shares)
    shards = plan_shards(count_row_groups(folder))
    counts = total(build_shards(build.out, shards, work, runtime=build.runtime, desc="contamination"))
    return ContaminationCounts(**counts, prompts=len(prompts), examples=_examples(build)).to_json()


class Prompt(NamedTuple):
    task: str
    row_id: str
    turns: list[list[str]]  # words


class Match(NamedTuple):
    """A prompt and its coverage by a row. ngram: its place among all prompts' words, and its length."""

    prompt: int
    coverage: float
    ngram: tuple[int, int]


class PromptIndex:
    """The n-grams of prompts with their places."""

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
        self._counts_word = np.ones(len(self.words), bool)  # False: wording of the task
        self._counts_word[_places(grams.starts[is_common], lengths[is_common])] = False
        self._num_counted = np.bincount(self._prompt_of_word[self._counts_word], minlength=len(prompts))
        rare = np.flatnonzero(~is_common)
        rare = rare[np.argsort(grams.hashes[rare], kind="stable")]
        self._starts, self._lengths = grams.starts[rare], lengths[rare]
        self._hashes, self._first = np.unique(grams.hashes[rare], return_index=True)
        self._end = np.append(self._first[1:], len(rare))
        self._inside = sorted({n, *(int(length) for length in np.unique(self._lengths) if length >= MIN_INSIDE)})

    def _common(self, hashes: np.ndarray, prompt: np.ndarray, common_share: float) -> np.ndarray:
        """Whether more than common_share of the task's prompts have an n-gram: bool, shape (n-grams,)."""
        names = sorted({each.task for each in self.prompts})
        task = np.array([names.index(each.task) for each in self.prompts], np.int64)
        num_prompts = np.bincount(task, minlength=len(names))
        _, number = np.unique(hashes, return_inverse=True)
        held = np.unique(number * len(self.prompts) + prompt)  # each pair of an n-gram and a prompt that has it, once
        by_task = held // len(self.prompts) * len(names) + task[held % len(self.prompts)]
        pairs, counts = np.unique(by_task, return_counts=True)
        of = np.searchsorted(pairs, number * len(names) + task[prompt])
        return (counts[of] >= MIN_COMMON) & (counts[of] > common_share * num_prompts[task[prompt]])

    def match(self, rows: list[list[list[str]]], threshold: float) -> list[list[Match]]:
        """For each row the prompts that it covers to at least the threshold. rows: the words of each turn."""
        hashed = hash_turns([turn for row in rows for turn in row])
        row_of_word = np.repeat(np.arange(len(rows)), np.array([sum(map(len, row)) for row in rows], np.int64))
        hits = np.concatenate([self._hits(hashed, row_of_word, n) for n in self._inside], axis=1)
        matches: list[list[Match]] = [[] for _ in rows]
        for row in np.unique(hits[0]).tolist():
            matches[row] = self._covered(np.unique(hits[1, hits[0] == row]), threshold)
        return matches

    def _hits(self, hashed: HashedTurns, row_of_word: np.ndarray, n: int) -> np.ndarray:
        """Rows, and the numbers of the prompts' n-grams that they contain: int64, shape (2, hits)."""
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
        covered = np.bincount(self._prompt_of_word[places[self._counts_word[places]]], minlength=len(self.prompts))
        matching = np.flatnonzero((covered > 0) & (covered >= threshold * self._num_counted))
        examples = {int(self._prompt_of_word[self._starts[entry]]): int(entry) for entry in entries[::-1]}
        return [
            Match(
                prompt,
                float(covered[prompt] / self._num_counted[prompt]),
                (int(self._starts[examples[prompt]]), int(self._lengths[examples[prompt]])),
            )
            for prompt in matching.tolist()
        ]


def _places(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers of several ranges, one range after another.

    >>> _places(np.array([3, 7]), np.array([2, 1])).tolist()
    [3, 4, 7]
    """
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def _prepare_work(
    folder: Path,
    prompts: list[Prompt],
    ngram: int,
    common_share: float,
    threshold: float,
    shares: dict[str, float],
) -> Work:
    return functools.partial(_search_shard, folder, PromptIndex(prompts, ngram, common_share), threshold, shares)


def _search_shard(
    folder: Path, index: PromptIndex, threshold: float, shares: dict[str, float], shard: Shard, out: Path
) -> Tally:
    table_rows: list[tuple[Any, ...]] = []
    num_rows = num_contaminated = 0
    for conversations, table in read_groups(folder, shard.first_group, shard.end_group, ("row_id", "prompt_hash")):
        in_train = np.flatnonzero(splits.assign(table["prompt_hash"].to_numpy(), **shares) == splits.TRAIN)
        said = [[folded_words(turn.text) for turn in turns(conversations[row])] for row in in_train]
        for row, matches in zip(in_train, index.match(said, threshold), strict=True):
            table_rows += _by_task(index, table["row_id"][int(row)].as_py(), matches)
            num_contaminated += bool(matches)
        num_rows += len(in_train)
    columns = list(map(list, zip(*table_rows, strict=True))) or [[] for _ in CONTAMINATION.names]
    pq.write_table(pa.table(columns, schema=CONTAMINATION), out / "contamination.parquet", compression="zstd")
    tasks = [task for _, task, *_ in table_rows]
    by_task = {task: tasks.count(task) for task in sorted(set(tasks))}
    return {"rows": num_rows, "contaminated": num_contaminated, "tasks": by_task}


def _by_task(index: PromptIndex, row_id: str, matches: list[Match]) -> list[tuple[Any, ...]]:
    """A row of the table for each task, with the task's prompt of the highest coverage."""
    tasks = [index.prompts[match.prompt].task for match in matches]
    table_rows = []
    for task in dict.fromkeys(tasks):
        of_task = [match for match, its_task in zip(matches, tasks, strict=True) if its_task == task]
        best = max(of_task, key=lambda match: match.coverage)
        start, length = best.ngram
        example = " ".join(index.words[start : start + length])
        table_rows.append((row_id, task, index.prompts[best.prompt].row_id, best.coverage, example, len(of_task)))
    return table_rows


def _examples(build: Build) -> list[ContaminatedRow]:
    tables = [read_table(shard / "contamination.parquet") for shard in shard_folders(build.out)]
    table_rows = pa.concat_tables(tables).slice(0, NUM_EXAMPLES).to_pylist()
    folder = build.inputs["conversations"]
    row_ids = read_column(folder, "row_id").to_pylist() if table_rows else []
    examples = []
    for row in table_rows:
        [(_, [conversation])] = read_places(folder, np.array([row_ids.index(row["row_id"])]))
        prompts = read_table(build.inputs[f"prompts:{row['task']}"] / "prompts.parquet").to_pylist()
        questions = next(prompt["turns"] for prompt in prompts if prompt["row_id"] == row["report_row_id"])
        text = excerpt(turns(conversation))
        examples.append(ContaminatedRow(**row, text=text, prompt=" | ".join(questions)[:300]))
    return examples
