"""Decontamination: a report prompt is found wherever a training row holds it, and wording alone is no question."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sft_core.data.overlap.decontamination import Prompt, PromptIndex
from sft_core.data.overlap.report_prompts import questions
from sft_core.data.overlap.words import folded_words
from sft_core.data.shards.parallel import shard_folders
from sft_core.data.sources.splits import REPORT, assign, prompt_hash
from sft_core.store.store import Store
from steps.decontaminate import CONTAMINATION, REPORT_PROMPTS
from steps.mix import MIXTURE

VOCABULARY = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in ("l", "m", "n", "rt", "ss")]
SHARES = {"report_share": 0.3, "selection_share": 0.0}


def prose(seed: int, num_words: int = 20) -> str:
    return " ".join(random.Random(seed).choices(VOCABULARY, k=num_words))


def chat(user: str, assistant: str = "Yes.", system: str | None = None) -> dict[str, Any]:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *messages]}


def is_held_out(row: dict[str, Any]) -> bool:
    import numpy as np

    return assign(np.array([prompt_hash(row)], np.uint64), **SHARES)[0] == REPORT


def held_out(make: Callable[[int], dict[str, Any]], num: int, start: int = 0) -> list[dict[str, Any]]:
    found = [row for row in map(make, range(start, start + 20 * num)) if is_held_out(row)][:num]
    assert len(found) == num
    return found


def trained(make: Callable[[int], dict[str, Any]], start: int = 0) -> dict[str, Any]:
    return next(row for row in map(make, range(start, start + 100)) if not is_held_out(row))


TASK = held_out(lambda n: chat(prose(n)), 8)
QUESTION = TASK[0]["messages"][0]["content"]
UNRELATED = trained(lambda n: chat(prose(5000 + n, 60)))


@pytest.fixture
def search(write_rows, pinned, ensure) -> Callable[..., list[dict[str, Any]]]:
    """The table of the source `chats`, whose rows are searched for the prompts of `task`."""

    def run(
        rows: list[Any], task: list[Any] = TASK, decontamination: dict[str, Any] | None = None, **sections: Any
    ) -> list[dict[str, Any]]:
        paths = [{"path": str(write_rows(f"{name}.jsonl", of))} for name, of in (("task", task), ("chats", rows))]
        mixture = {"decontamination": decontamination or {}, **SHARES}
        run.recipe = pinned(*paths, mixture=mixture, **{"evaluation": {"tasks": ["task"]}, **sections})
        folder, manifest = ensure(CONTAMINATION, run.recipe, source="chats")
        run.counts = manifest["counts"]
        return [
            row for shard in shard_folders(folder) for row in pq.read_table(shard / "contamination.parquet").to_pylist()
        ]

    return run


def test_report_prompt_inside_a_longer_conversation_of_another_source_is_found(search, ensure):
    typed = QUESTION.upper().replace(" ", ",  ")
    holds = trained(lambda n: chat(f"{prose(900 + n, 50)} {typed}! {prose(950 + n, 50)}"))
    [row] = search([UNRELATED, holds])
    assert (row["task"], row["coverage"], row["num_prompts"]) == ("task", 1.0, 1)
    assert row["ngram"] == " ".join(QUESTION.split()[:8])
    assert search.counts["contaminated"] == 1 and search.counts["tasks"] == {"task": 1}
    assert (search.counts["rows"], search.counts["prompts"]) == (2, 8)
    [example] = search.counts["examples"]
    assert example["prompt"] == QUESTION and example["text"].startswith(f"user: {prose(900, 5)[:10]}"[:8])
    counts = ensure(MIXTURE, search.recipe)[1]["counts"]["sources"]["chats"]
    assert (counts["train"], counts["contaminated"], counts["kept"]) == (2, 1, 1)


def test_report_names_the_row_and_the_prompt(search, ensure, write_rows):
    holds = trained(lambda n: chat(f"{prose(900 + n)} {QUESTION}"))
    [row] = search([UNRELATED, holds])
    ids = {}
    from steps.download import CONVERSATIONS

    for source in ("task", "chats"):
        folder, _ = ensure(CONVERSATIONS, search.recipe, source=source)
        ids[source] = pq.read_table(folder / "conversations.parquet")["row_id"].to_pylist()
    assert row["row_id"] == ids["chats"][1]
    assert row["report_row_id"] == ids["task"][0]


@pytest.mark.parametrize("place", ["system", "assistant", "reasoning", "tool"])
def test_prompt_is_found_wherever_the_row_holds_it(search, place: str):
    def row(n: int) -> dict[str, Any]:
        text = f"{prose(n, 5)} {QUESTION} {prose(n + 1, 5)}"
        found = chat(prose(700 + n), system="Be kind." if place != "system" else text)
        if place == "assistant":
            found["messages"][-1]["content"] = text
        if place == "reasoning":
            found["messages"][-1]["reasoning_content"] = text
        if place == "tool":
            call = {"type": "function", "function": {"name": "f", "arguments": {}}}
            called = {"role": "assistant", "content": "", "tool_calls": [call]}
            found["messages"][2:2] = [called, {"role": "tool", "content": text}]
        return found

    assert len(search([trained(row), UNRELATED])) == 1


def test_coverage_is_the_share_of_the_prompts_words_and_the_threshold_decides(search):
    half = " ".join(QUESTION.split()[:10])
    holds = trained(lambda n: chat(f"{half} {prose(600 + n, 30)}"))
    assert [row["coverage"] for row in search([holds])] == [0.5]
    assert search([holds], decontamination={"threshold": 0.51}) == []
    seven = trained(lambda n: chat(f"{' '.join(QUESTION.split()[:7])} {prose(600 + n, 30)}"))
    assert search([seven], decontamination={"threshold": 0.01}) == [], "7 words are no 8-gram"
    assert [row["coverage"] for row in search([seven], decontamination={"threshold": 0.01, "ngram": 7})] == [
        pytest.approx(0.35)
    ]


def test_held_out_rows_and_unrelated_ones_are_left_alone(search, ensure):
    assert search([UNRELATED, *TASK]) == []
    assert search.counts["rows"] == 1, "a row of the report split is no training row"


def test_wording_that_a_tasks_prompts_share_is_no_question(search):
    wording = "Solve the puzzle step by step and give your answer after the word answer please:"
    task = held_out(lambda n: chat(f"{wording} {prose(n, 6)}"), 40)
    other = trained(lambda n: chat(f"{wording} {prose(3000 + n, 6)}"))
    same = task[0]["messages"][0]["content"].removeprefix(wording)
    holds = trained(lambda n: chat(f"{wording} {same} {prose(n, 2)}"))
    [row] = search([other, holds], task)
    assert row["coverage"] == 1.0
    assert len(search([other, holds], task, {"common_share": 1.0})) == 2, "as Tulu 3 counts"


def test_short_prompt_is_found_as_a_phrase_and_a_very_short_one_as_a_turn(search):
    """Four words inside a longer text are a find; `Go on.` is one only where somebody says just that."""
    task = held_out(lambda n: chat(f"Who was king {prose(n, 1)}"), 1) + held_out(lambda n: chat(f"Hello {n}"), 1)
    phrase, hello = (row["messages"][0]["content"] for row in task)
    inside = trained(lambda n: chat(f"{prose(n)} {phrase}, {prose(n + 1)}"))
    greets = trained(lambda n: chat(f"{prose(200 + n)} {hello} {prose(300 + n)}"))
    says = {"messages": [*chat(f"{hello}!")["messages"], *chat(prose(400))["messages"]]}
    found = search([inside, greets, says, UNRELATED], task)
    assert [row["ngram"] for row in found] == [" ".join(folded_words(text)) for text in (phrase, hello)]


def test_prompts_of_a_task_are_unique_report_rows_of_its_source(search, ensure):
    search([UNRELATED], task=[*TASK, TASK[0], UNRELATED])
    folder, manifest = ensure(REPORT_PROMPTS, search.recipe, task="task")
    prompts = pq.read_table(folder / "prompts.parquet").to_pylist()
    assert manifest["counts"] == {"prompts": 8, "without_words": 0}
    assert [prompt["turns"] for prompt in prompts] == [[row["messages"][0]["content"]] for row in TASK]


def test_question_is_the_user_turns_and_the_system_turn_only_without_them():
    talk = chat("A?", system="S.")
    talk["messages"] += chat("B?")["messages"]
    assert questions(talk) == ["A?", "B?"]
    assert questions(chat("...", system="S.")) == ["S."]
    assert questions({"text": "T."}) == ["T."]
    assert questions(chat("!!!")) == []


def test_same_question_below_another_system_turn_is_found_and_another_below_the_same_is_not(search):
    system = prose(77, 100)
    task = held_out(lambda n: chat(prose(n), system=system), 2)
    question = task[0]["messages"][1]["content"]
    same = trained(lambda n: chat(question, system=prose(800 + n, 100)))
    other = trained(lambda n: chat(prose(4000 + n), system=system))
    assert [row["coverage"] for row in search([same, other], task)] == [1.0]


def test_matches_of_several_tasks_and_prompts_are_told_apart():
    prompts = [Prompt(f"task{n % 2}", str(n), [folded_words(prose(n))]) for n in range(4)]
    index = PromptIndex(prompts, 8, 0.02)
    rows = [[folded_words(f"{prose(0)} and {prose(2)}")], [folded_words(prose(9))], [folded_words(prose(3)), ["x"]]]
    assert [[(m.prompt, m.coverage) for m in found] for found in index.match(rows, 0.5)] == [
        [(0, 1.0), (2, 1.0)],
        [],
        [(3, 1.0)],
    ]
    assert PromptIndex([], 8, 0.02).match(rows, 0.5) == [[], [], []]
    assert PromptIndex([Prompt("t", "0", [])], 8, 0.02).match(rows, 0.5) == [[], [], []]


def test_rows_and_prompts_of_any_shard_are_searched(search, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sft_core.data.sources.read.ROWS_A_GROUP", 3)
    rows = [trained(lambda n: chat(prose(n, 40)), start=10_000 + 200 * n) for n in range(10)]
    question = TASK[7]["messages"][0]["content"]
    rows[8] = trained(lambda n: chat(f"{prose(900 + n)} {question}"))
    assert len(search(rows)) == 1
    assert search.counts["rows"] == 10 and search.counts["examples"][0]["prompt"] == question


def test_one_more_source_searches_only_its_own_rows(search, ensure, tmp_path: Path, write_rows, pinned):
    search([UNRELATED])
    store = Store(tmp_path / "store")
    sources = [
        dataset.model_dump(mode="json", exclude_none=True)
        for dataset in search.recipe.recipe.last_phase.dataset_mixture.datasets
    ]
    more = {"path": str(write_rows("more.jsonl", [trained(lambda n: chat(prose(n, 40)))]))}
    mixture = {"decontamination": {}, **SHARES}
    recipe = pinned(*sources, more, mixture=mixture, evaluation={"tasks": ["task"]})
    statuses = {
        source: store.locate(CONTAMINATION, recipe, {"source": source}).status for source in ("chats", "task", "more")
    }
    assert statuses == {"chats": "hit", "task": "build", "more": "depends"}
