"""Duplicates: what is one, which of two is kept, and that nothing but the content decides."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_core.data.overlap.candidates import Signatures, rows_a_band
from sft_core.data.overlap.deduplication import verified
from sft_core.data.overlap.minhash import sign
from sft_core.data.overlap.signatures import gram_sets, similarity
from sft_core.data.overlap.words import Turn, exact_digest, hash_turns, ngrams, turns, words
from sft_core.data.shards.token_shards import read_index
from sft_core.data.sources.read import accept
from steps.deduplicate import DUPLICATES, SIGNATURES
from steps.mix import MIXTURE
from steps.tokenize import TOKENS

ROOT = Path(__file__).parents[3]
VOCABULARY = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in ("l", "m", "n", "rt", "ss")]
Duplicates = Callable[..., tuple[list[dict[str, Any]], dict[str, Any]]]


def prose(seed: int, num_words: int = 80) -> str:
    return " ".join(random.Random(seed).choices(VOCABULARY, k=num_words))


def edited(text: str, num_words: int) -> str:
    """The text with its last words changed."""
    kept = text.split()[:-num_words] if num_words else text.split()
    return " ".join([*kept, *(f"other{number}" for number in range(num_words))])


def chat(user: str, assistant: str, reasoning: str | None = None, **row: Any) -> dict[str, Any]:
    answer = {"role": "assistant", "content": assistant} | ({"reasoning_content": reasoning} if reasoning else {})
    return {"messages": [{"role": "user", "content": user}, answer], **row}


@pytest.fixture
def find(write_rows, pinned, ensure) -> Duplicates:
    """The table of duplicates of sources given as rows, and the stage's counts."""

    def run(
        deduplication: dict[str, Any] | None = None,
        mixture: dict[str, Any] | None = None,
        datasets: dict[str, dict[str, Any]] | None = None,
        **sources: list[Any],
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        paths = [
            {"path": str(write_rows(f"{name}.jsonl", rows))} | (datasets or {}).get(name, {})
            for name, rows in sources.items()
        ]
        run.recipe = pinned(*paths, mixture={"deduplication": deduplication or {}} | (mixture or {}))
        folder, manifest = ensure(DUPLICATES, run.recipe)
        return pq.read_table(folder / "duplicates.parquet").to_pylist(), manifest["counts"]

    return run


def chat_id(row: dict[str, Any]) -> str:
    return accept(row, "messages").row_id


def what_repeats_what(table: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    return [(row["source"], row["of_source"], row["kind"]) for row in table]


FILLER = [chat(prose(1000 + n), prose(2000 + n)) for n in range(30)]


@pytest.mark.slow
def test_near_duplicate_in_two_sources_is_left_out_of_the_later_one(find: Duplicates):
    a, b = chat(prose(1), prose(2)), chat(edited(prose(1), 3), edited(prose(2), 3))
    table, counts = find(first=[*FILLER, a], second=[b, chat(prose(3), prose(4))])
    [row] = table
    assert (row["source"], row["of_source"], row["kind"]) == ("second", "first", "near")
    assert 0.8 <= row["similarity"] < 1 and abs(row["estimated"] - row["similarity"]) < 0.15
    assert (counts["rows"], counts["exact"], counts["near"]) == (33, 0, 1)
    assert counts["pairs"] == [{"source": "second", "of": "first", "kind": "near", "rows": 1}]
    assert counts["sources"]["second"] == {"rows": 2, "exact": 0, "near": 1}
    [example] = counts["examples"]
    assert example["row_id"] == row["row_id"] and example["of_row_id"] == row["of_row_id"]
    assert example["text"].startswith(f"user: {prose(1)[:40]}") and example["of_text"].startswith("user: ")
    assert find(second=[b, chat(prose(3), prose(4))], first=[*FILLER, a])[0][0]["source"] == "first"


def test_exact_duplicates_differ_in_white_space_and_unicode_form_at_most(find: Duplicates):
    a = chat("Où est le café ?", "Là-bas,\n\n  au coin.")
    same = chat("Où est  le cafe\u0301 ?\n", "Là-bas, au coin.")
    other = chat("où est le café ?", "Là-bas, au coin.")
    table, counts = find({"near": False}, first=[a], second=[other, same, a])
    assert what_repeats_what(table) == [("second", "first", "exact")] * 2
    assert len({row["row_id"] for row in table}) == 2 and len({row["of_row_id"] for row in table}) == 1
    assert all(row["similarity"] == row["estimated"] == 1 for row in table)
    assert counts["exact"] == 2


def test_near_duplicate_is_kept_where_only_exact_ones_are_asked_for(find: Duplicates):
    rows = [chat(prose(1), prose(2)), chat(prose(1), edited(prose(2), 2))]
    assert find({"near": False}, a=rows)[0] == []
    assert len(find({"near": True}, a=rows)[0]) == 1


@pytest.mark.parametrize("modes", [(None, None), (False, True)])
def test_think_and_no_think_twin_is_kept(find: Duplicates, modes: tuple[Any, Any]):
    question, answer = prose(1), prose(2)
    kwargs = [{} if mode is None else {"chat_template_kwargs": {"enable_thinking": mode}} for mode in modes]
    twin, thinks = chat(question, answer, **kwargs[0]), chat(question, answer, reasoning=prose(3, 25), **kwargs[1])
    sets = gram_sets([turns(row) for row in (twin, thinks)], 5)
    assert len(np.intersect1d(*sets)) / len(np.union1d(*sets)) > 0.8, "as a whole they are like each other"
    assert find(a=[*FILLER, twin], b=[thinks])[0] == []
    assert find(a=[*FILLER, twin], b=[chat(question, prose(4), **kwargs[0])])[0] == []


def test_mode_without_reasoning_is_part_of_the_content(find: Duplicates):
    modes = [chat(prose(1), prose(2), chat_template_kwargs={"enable_thinking": mode}) for mode in (False, True)]
    assert find(a=modes)[0] == []


def test_paraphrase_below_the_threshold_is_kept(find: Duplicates):
    a, b = (chat(prose(1), text) for text in (prose(2), edited(prose(2), 12)))
    found = similarity(*gram_sets([turns(a), turns(b)], 5))
    assert 0.6 < found < 0.8
    assert find(a=[*FILLER, a], b=[b])[0] == []
    [row] = find({"threshold": 0.6}, a=[*FILLER, a], b=[b])[0]
    assert row["similarity"] == pytest.approx(found)


def long_context(system: str, tools: list[Any], user: str, assistant: str) -> dict[str, Any]:
    row = chat(user, assistant)
    return {"messages": [{"role": "system", "content": system}, *row["messages"]], "tools": tools}


TOOL = {"type": "function", "function": {"name": "look_up", "description": prose(9, 300), "parameters": {}}}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("What is 2 + 3?", "It is 5."), ("What is 7 + 4?", "It is 11.")),
        (("Is it good? Text: bal.", "B"), ("Is it good? Text: kam.", "B")),
        (("Go on.", "Yes."), ("Go on.", "No.")),
    ],
    ids=["other question and answer", "equal answer", "equal question"],
)
def test_long_shared_context_makes_no_duplicates(find: Duplicates, one: tuple[str, str], other: tuple[str, str]):
    rows = [long_context(prose(8, 300), [TOOL], *turn) for turn in (one, other)]
    sets = gram_sets([turns(row | {"kwargs": {}}) for row in rows], 5)
    assert len(np.intersect1d(*sets)) / len(np.union1d(*sets)) > 0.95
    assert find(a=rows)[0] == []


def test_likeness_is_not_passed_on(find: Duplicates):
    """Each is like the one before it, the last is not like the first: it is compared with what is kept."""
    text = prose(1, 100).split()
    steps = [chat(prose(2), " ".join([*text[6 * n :], *(f"new{k}" for k in range(6 * n))])) for n in range(3)]
    sets = gram_sets([turns(row) for row in steps], 5)
    assert similarity(sets[0], sets[1]) >= 0.8 and similarity(sets[1], sets[2]) >= 0.8 > similarity(sets[0], sets[2])
    table, _ = find(a=[*FILLER, *steps])
    assert len(table) == 1
    assert len(find(a=[*FILLER, steps[0], steps[2]])[0]) == 0


def test_copies_of_a_near_duplicate_repeat_the_row_that_is_kept(find: Duplicates, ensure):
    near = chat(prose(1), edited(prose(2), 3))
    table, _ = find(a=[chat(prose(1), prose(2)), near], b=[near, chat(prose(5), "x")])
    assert what_repeats_what(table) == [("a", "a", "near"), ("b", "a", "near")]
    assert len({row["of_row_id"] for row in table}) == 1 and table[0]["row_id"] == table[1]["row_id"]
    assert table[0]["of_row_id"] != table[0]["row_id"]
    counts = ensure(MIXTURE, find.recipe)[1]["counts"]["sources"]
    assert [(one["duplicates"], one["kept"]) for one in counts.values()] == [(1, 1), (1, 1)]


def test_held_out_row_is_neither_left_out_nor_the_one_that_is_kept(find: Duplicates, ensure):
    rows = [chat(f"{prose(n)}", prose(100 + n)) for n in range(60)]
    twins = [chat(f"Please: {row['messages'][0]['content']}", row["messages"][1]["content"]) for row in rows]
    table, _ = find(mixture={"report_share": 0.3, "selection_share": 0.2}, a=rows, b=twins)
    counts = ensure(MIXTURE, find.recipe)[1]["counts"]["sources"]
    assert 10 < len(table) < 40, "where only one of a pair is trained on, it is kept"
    for name, one in counts.items():
        assert one["report"] + one["selection"] > 15
        assert one["train"] == one["duplicates"] + one["available"]
        assert one["duplicates"] == sum(row["source"] == name for row in table)


def test_row_that_trains_nothing_takes_no_other_ones_place(find: Duplicates, ensure):
    """A source that a weight of 0 leaves out keeps no row that another source could train."""
    table, _ = find(a=[FILLER[0]], b=[FILLER[0], FILLER[1]], datasets={"a": {"weight": 0.0}})
    assert table == []
    assert ensure(MIXTURE, find.recipe)[1]["counts"]["sources"]["b"]["kept"] == 2


def test_all_rows_of_a_conversation_are_left_out_together(find: Duplicates, ensure):
    """Thinking that leaves the history gives a conversation several training rows."""
    talk = [
        {"role": "user", "content": prose(1)},
        {"role": "assistant", "content": prose(2), "reasoning_content": prose(3)},
        {"role": "user", "content": prose(4)},
        {"role": "assistant", "content": prose(5), "reasoning_content": prose(6)},
    ]
    changed = [*talk[:-1], talk[-1] | {"content": edited(prose(5), 2)}]
    find(a=[{"messages": talk}, {"messages": talk}, FILLER[0]], b=[{"messages": changed}, FILLER[1]])
    recipe = find.recipe.recipe.model_dump(mode="json")
    recipe["chat_template"]["thinking"] = "only_last"
    from sft_core.pins.pinned import pin
    from sft_core.recipe.parse import parse_recipe

    split = pin(parse_recipe(recipe))
    index = read_index(ensure(TOKENS, split, source="a")[0])["row_id"].to_pylist()
    assert index[0] == index[1] == index[2] == index[3] != index[4], "two rows for each of two copies"
    folder, manifest = ensure(MIXTURE, split)
    counts = manifest["counts"]["sources"]
    assert (counts["a"]["duplicates"], counts["a"]["kept"]) == (2, 3)
    assert (counts["b"]["duplicates"], counts["b"]["kept"]) == (2, 1)
    rows = pq.read_table(folder / "mixture.parquet").to_pylist()
    assert sorted((row["source"], row["row"]) for row in rows) == [(0, 0), (0, 1), (0, 4), (1, 2)]


def test_raw_text_is_compared_as_it_stands(write_rows, pinned, ensure):
    rows = [{"text": prose(1)}, {"text": edited(prose(1), 2)}, {"text": prose(2)}]
    path = str(write_rows("raw.jsonl", rows))
    recipe = pinned({"path": path}, mixture={"deduplication": {}}, training={"loss_scope": "all"})
    assert ensure(DUPLICATES, recipe)[1]["counts"]["near"] == 1


@pytest.mark.slow
def test_rows_of_any_shard_are_compared(find: Duplicates, monkeypatch: pytest.MonkeyPatch, ensure):
    monkeypatch.setattr("sft_core.data.sources.read.ROWS_A_GROUP", 3)
    rows = [chat(prose(n), prose(100 + n)) for n in range(20)]
    again = [chat(edited(prose(n), 2), edited(prose(100 + n), 2)) for n in (17, 4, 9)]
    table, counts = find(a=rows, b=[chat(prose(500), prose(501)), *again])
    folder, _ = ensure(SIGNATURES, find.recipe, source="a")
    assert len(list(folder.glob("shard-*"))) > 3
    assert what_repeats_what(table) == [("b", "a", "near")] * 3
    order = [chat_id(row) for row in rows]
    assert [order.index(row["of_row_id"]) for row in table] == [17, 4, 9]
    assert counts["examples"][0]["of_text"].startswith(f"user: {prose(17)[:40]}")


# Stages


def test_signatures_of_other_sources_and_for_other_thresholds_are_kept(find: Duplicates, tmp_path: Path):
    def signed() -> list[str]:
        lines = map(json.loads, (tmp_path / "store" / "builds.jsonl").read_text().splitlines())
        return [line["part"]["source"] for line in lines if line["stage"] == SIGNATURES.name]

    find(a=FILLER[:5], b=FILLER[5:9])
    assert signed() == ["a", "b"]
    find({"threshold": 0.5}, {"report_share": 0.1, "seed": 3}, a=FILLER[:5], b=FILLER[5:9])
    assert signed() == ["a", "b"]
    find(c=FILLER[9:12], a=FILLER[:5], b=FILLER[5:9])
    assert signed() == ["a", "b", "c"]
    find({"ngram": 4}, a=FILLER[:5])
    assert signed() == ["a", "b", "c", "a"]


@pytest.mark.long
def test_result_is_the_same_whatever_the_hash_seed_and_the_workers(find: Duplicates, tmp_path: Path):
    rows = [chat(edited(prose(n % 40), n % 3), edited(prose(100 + n % 40), n % 4)) for n in range(120)]
    find(a=rows[:70], b=rows[70:])
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(find.recipe.recipe.model_dump(mode="json", exclude_none=True)))
    code = (
        "import sys, json\nfrom sft_core.pins.pinned import pin\nfrom sft_core.recipe.parse import load_recipe\n"
        "from sft_core.store.store import Store\nfrom steps.deduplicate import DUPLICATES\n"
        "pinned = pin(load_recipe(sys.argv[1], overrides=tuple(sys.argv[2:])))\n"
        "store = Store(pinned.recipe.runtime.store)\nref = store.ensure(DUPLICATES, pinned)\n"
        "manifest = store.manifest(ref)\nprint(manifest['counts']['near'], manifest['content'], ref.key)"
    )
    printed = []
    for seed, workers in (("1", 1), ("2", 2), ("77", 1)):
        sets = [f"runtime.store={tmp_path}/store{seed}", f"runtime.num_workers={workers}"]
        command = [sys.executable, "-c", code, str(recipe), *sets]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert int(printed[0].split()[0]) > 20
    assert len(set(printed)) == 1


# What the stages are made of


def brute_force(sets: list[np.ndarray], threshold: float) -> dict[int, int]:
    """The most similar of the kept rows before it, for each row that reaches the threshold with one."""
    kept: list[int] = []
    found = {}
    for row, grams in enumerate(sets):
        best = max(kept, key=lambda other: similarity(grams, sets[other]), default=None)
        if best is not None and similarity(grams, sets[best]) >= threshold:
            found[row] = best
        else:
            kept.append(row)
    return found


def near(sets: list[np.ndarray], threshold: float) -> dict[int, Any]:
    parts = [sign(sets[: len(sets) // 3], 128), sign(sets[len(sets) // 3 :], 128)]
    part = np.repeat([0, 1], [len(one) for one in parts])
    known = Signatures(parts, part, np.concatenate([np.arange(len(one)) for one in parts]))
    found = known.candidates(threshold)
    involved = np.zeros(len(sets), bool)
    involved[found.of[:, 0] >= 0] = True
    involved[found.of[found.of >= 0]] = True
    return dict(verified(((row, sets[row]) for row in np.flatnonzero(involved).tolist()), found, known, threshold))


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_near_duplicates_are_those_that_comparing_every_pair_finds(threshold: float):
    texts = [edited(prose(seed % 60, 60), random.Random(seed).randrange(12)) for seed in range(300)]
    sets = gram_sets([[Turn("user", text)] for text in texts], 5)
    found, expected = near(sets, threshold), brute_force(sets, threshold)
    assert len(expected) > 30
    assert set(found) <= set(expected) and len(found) >= 0.97 * len(expected), "MinHash finds nearly all, and no other"
    for row, match in found.items():
        assert match.of < row and match.of not in found
        assert match.similarity == similarity(sets[row], sets[match.of]) >= threshold


def test_rows_that_look_alike_without_end_are_cut_and_counted():
    sets = gram_sets([[Turn("user", f"{prose(1, 60)} {prose(seed, 6)}")] for seed in range(60)], 5)
    known = Signatures([sign(sets, 128)], np.zeros(60, np.int32), np.arange(60))
    assert known.candidates(0.3).num_cut == 0
    assert 20 < known.candidates(0.3, max_compared=5).num_cut < 60


def test_signature_estimates_similarity_and_is_that_of_the_set():
    universe = np.random.default_rng(0).integers(0, 2**32, 500, dtype=np.uint32)
    a, b = universe[:450], universe[50:]
    signed = sign([a, np.concatenate([a, a])[::-1], b, a[:0]], 256)
    assert (signed[0] == signed[1]).all()
    assert abs((signed[0] == signed[2]).mean() - 0.8) < 0.08
    long = np.arange(10_000, dtype=np.uint32)
    assert (sign([long], 16) == sign([long[:5000]], 16).clip(max=sign([long[5000:]], 16))).all()


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 1.0])
def test_bands_bring_nearly_every_pair_at_the_threshold_together(threshold: float):
    rows = rows_a_band(threshold, 128)
    missed = (1 - threshold**rows) ** (128 // rows)
    assert missed <= 0.01
    assert rows == 128 or (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) > 0.01


def grams_of(texts: list[str], n: int) -> list[int]:
    return ngrams(hash_turns([text.split() for text in texts]), n).hashes.tolist()


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=9), max_size=5), st.integers(1, 6))
def test_ngrams_never_cross_turns_and_a_short_turn_is_one(texts: list[list[str]], n: int):
    found = ngrams(hash_turns(texts), n)
    expected = [tuple(turn[at : at + n]) for turn in texts for at in range(max(1, len(turn) - n + 1)) if turn]
    assert len(found.hashes) == len(expected)
    by_gram: dict[Any, int] = {}
    for gram, value in zip(expected, found.hashes.tolist(), strict=True):
        assert by_gram.setdefault(gram, value) == value
    assert len(set(by_gram.values())) == len(by_gram), "other words, other hashes"


def test_ngram_of_a_short_turn_equals_the_same_words_inside_a_longer_one():
    assert grams_of(["x y"], 5)[0] in grams_of(["a x y b"], 2)
    assert grams_of(["x y"], 5) != grams_of(["y x"], 5)


def test_words_keep_case_and_symbols_and_split_scripts_without_spaces():
    assert words("If x+1 == Y: print('ok')") == [
        *("If", "x", "+", "1", "=", "=", "Y", ":", "print", "(", "'", "ok", "'", ")")
    ]
    assert words("你好 world ไทย") == ["你", "好", "world", "ไ", "ท", "ย"]


def test_turns_hold_all_that_shapes_what_is_trained():
    call = {"type": "function", "id": "call_1", "function": {"name": "add", "arguments": {"a": 1}}}
    conversation = {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": [{"type": "text", "text": "U"}, {"type": "text", "text": "V"}]},
            {"role": "assistant", "content": "", "reasoning_content": "R", "tool_calls": [call], "train": False},
            {"role": "tool", "content": "T"},
            {"role": "assistant", "content": "A", "weight": 0.5},
        ],
        "tools": [TOOL],
        "kwargs": {"enable_thinking": True},
        "answer": "A",
    }
    roles = ["settings", "tools", "system", "user", "reasoning", "tool_calls", "tool", "assistant"]
    assert [turn.role for turn in turns(conversation)] == roles
    assert turns(conversation)[3].text == "UV"
    digest = exact_digest(turns(conversation))
    assert digest == exact_digest(turns(conversation | {"answer": "B"}))
    for path in ("messages.0.content", "messages.2.train", "messages.4.weight", "kwargs.enable_thinking", "tools"):
        changed = json.loads(json.dumps(conversation))
        *parents, last = path.split(".")
        node = changed
        for parent in parents:
            node = node[int(parent) if parent.isdigit() else parent]
        node[last] = {"tools": []}.get(last, "other")
        assert exact_digest(turns(changed)) != digest, path
