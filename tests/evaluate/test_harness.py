"""lm-eval tasks over local data, scored on a tiny model of random weights; what comes is worked out anew."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sft_core.data.rendering.templates import ChatTemplate
from sft_core.evaluate.documents import document_differences, read_samples
from sft_core.evaluate.harness import scores_of
from sft_core.pins.pinned import PinnedRecipe, pin
from sft_core.recipe.parse import parse_recipe
from sft_core.store.ref import Ref
from sft_core.store.store import Store
from sft_core.train.job import ModelLoader, TokenizerLoader
from sft_core.train.models.model import load_model
from steps.cards.lm_eval_task import card
from steps.harness import HARNESS
from tests.browser import Browser
from tests.train.tiny import tiny_recipe

WORDS = ["abc", "hello", "lumr", "stub", "ten", "mint", "rose", "glad"]
CHOICE = """\
task: which_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "copy: {{{{word}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITE = """\
task: write_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "copy: {{{{word}}}}"
doc_to_target: "{{{{word}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two tasks and their data: as many right answers by chance as to make a share."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "words.jsonl"
    rows = [
        {"word": word, "choices": [WORDS[i % 8], WORDS[(i + 3) % 8], "x" * (1 + i % 4)], "label": i % 3}
        for i, word in enumerate(WORDS * 3)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "which_word.yaml").write_text(CHOICE.format(data=data))
    (folder / "write_word.yaml").write_text(WRITE.format(data=data))
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


def pinned_with(tasks: Path, *names: str, **asked: Any) -> PinnedRecipe:
    lm_eval = {"tasks": list(names), "include_path": str(tasks), **asked}
    return pin(parse_recipe(tiny_recipe(evaluation={"lm_eval": lm_eval}, runtime={"eval_batch_size": 5})))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Addresses that somebody tried to reach; none can be."""
    asked: list[Any] = []

    def refuse(self: Any, address: Any) -> None:
        asked.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *names, **more: refuse(None, names))
    return asked


def scored(store: Store, pinned: PinnedRecipe, task: str) -> tuple[dict[str, Any], Path, Ref]:
    ref = store.ensure(HARNESS, pinned, model="base", task=task)
    return store.manifest(ref)["counts"], store.path(ref), ref


def prompt_of(pinned: PinnedRecipe, word: str) -> str:
    template = pinned.template_arguments
    rendering = ChatTemplate(template["source"], {}, pinned.recipe.chat_template.date, template["kwargs"])
    return rendering.render([{"role": "user", "content": f"copy: {word}"}], add_generation_prompt=True)


def start_model(pinned: PinnedRecipe) -> tuple[Any, Any]:
    return load_model(
        ModelLoader(**pinned.model_loader),
        TokenizerLoader(**pinned.tokenizer_loader),
        seed=pinned.recipe.last_phase.training.seed,
    )


@torch.inference_mode()
def logits_of(model: Any, ids: list[int]) -> Any:
    return model.eval()(torch.tensor([ids])).logits[0]


@pytest.mark.slow
def test_multiple_choice_scores_are_those_of_the_models_own_likelihoods(
    tasks: Path, store: Store, no_network: list[Any]
) -> None:
    pinned = pinned_with(tasks, "which_word")
    counts, folder, _ = scored(store, pinned, "which_word")
    model, tokenizer = start_model(pinned)
    right, right_by_length = [], []
    samples = read_samples(folder, 100)
    for sample in samples:
        doc = sample["doc"]
        prompt = tokenizer.encode(prompt_of(pinned, doc["word"]), add_special_tokens=False)
        sums = []
        for choice in doc["choices"]:
            answer = tokenizer.encode(choice, add_special_tokens=False)
            logits = logits_of(model, prompt + answer)[len(prompt) - 1 : -1]
            found = torch.log_softmax(logits.double(), -1)[range(len(answer)), answer]
            sums.append(float(found.sum()))
        right.append(float(np.argmax(sums) == doc["label"]))
        right_by_length.append(
            float(np.argmax([one / len(c) for one, c in zip(sums, doc["choices"], strict=True)]) == doc["label"])
        )
        assert sample["arguments"][0][0] == prompt_of(pinned, doc["word"])
        assert sample["acc"] == right[-1]
    assert len(samples) == 24 == counts["rows"] and 0 < sum(right) < 24
    by_name = {score["metric"]: score for score in counts["scores"]}
    assert by_name["acc"]["value"] == pytest.approx(np.mean(right)) and by_name["acc"]["n"] == 24
    assert by_name["acc"]["stderr"] == pytest.approx(np.std(right, ddof=1) / 24**0.5)
    assert no_network == []


@pytest.mark.slow
def test_differences_pair_documents_and_leave_out_what_is_no_mean_of_them(
    tasks: Path, store: Store, tmp_path: Path
) -> None:
    folders = []
    for seed in (42, 7):  # of two start models
        data = tiny_recipe(
            evaluation={"lm_eval": {"tasks": ["which_word"], "include_path": str(tasks)}}, training={"seed": seed}
        )
        data["model"]["config"] |= {"initializer_range": 1.0}  # or every model prefers the shortest choice
        folders.append(scored(store, pin(parse_recipe(data)), "which_word")[1])
    values = [{one["doc_id"]: one["acc"] for one in read_samples(folder)} for folder in folders]
    changes = np.array([values[1][doc] - values[0][doc] for doc in values[0]])
    assert 0 < np.count_nonzero(changes) < 24
    found = document_differences(*folders)
    assert set(found) == {"acc", "acc_norm"}
    assert (found["acc"].n, found["acc"].value) == (24, pytest.approx(changes.mean()))
    low, high = found["acc"].low, found["acc"].high
    assert low is not None and high is not None
    half = 1.96 * changes.std(ddof=1) / 24**0.5
    assert changes.mean() - low == pytest.approx(half, rel=0.35) == pytest.approx(high - changes.mean(), rel=0.35)

    # The documents of one side in another order, one of them asked otherwise, and a score that is no mean of them.
    turned = tmp_path / "turned"
    turned.mkdir()
    samples = read_samples(folders[1])[::-1]
    samples[0]["prompt_hash"] = "another"
    (turned / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))
    scores = json.loads((folders[1] / "scores.json").read_text())
    scores[1]["value"] += 0.01
    (turned / "scores.json").write_text(json.dumps(scores))
    found = document_differences(folders[0], turned)
    assert set(found) == {scores[0]["metric"]}
    assert (found["acc"].n, found["acc"].value) == (23, pytest.approx(changes[:-1].mean()))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["which_word", "write_word"])
def test_card_shows_the_scores_of_its_manifests_and_what_came(
    tasks: Path, store: Store, browser: Browser, task: str
) -> None:
    refs = {}
    for model, seed in (("base", 42), ("tuned", 7)):
        data = tiny_recipe(
            evaluation={"lm_eval": {"tasks": [task], "include_path": str(tasks)}}, training={"seed": seed}
        )
        refs[model] = scored(store, pin(parse_recipe(data)), task)[2]
    page = browser.card(card(store, refs))
    assert page.errors == [] and page.headings == [f"Task lm_eval:{task}"]
    shown = {name.replace("\n", " "): value.replace("\n", " ") for name, value in page.tables[0]}
    counts = {model: store.manifest(ref)["counts"] for model, ref in refs.items()}
    assert shown["documents"] == str(counts["tuned"]["rows"]) == "24"
    for base, tuned in zip(counts["base"]["scores"], counts["tuned"]["scores"], strict=True):
        told = shown[f"{tuned['metric']}: base → tuned"]
        assert told.startswith(f"{base['value']:.4f} ± {base['stderr']:.4f} → {tuned['value']:.4f} ± ")
        assert f"; {tuned['value'] - base['value']:+.4f}, 95 % " in told
        if tuned["value"] == 0:
            assert f"Red flag: {tuned['metric']}: tuned is exactly 0" in page.text
    samples = read_samples(store.path(refs["tuned"]), 12)
    rows = page.tables[1][1:]
    assert [row[1] for row in rows] == [str(sample["target"]) for sample in samples]
    if task == "which_word":
        for row, sample in zip(rows, samples, strict=True):
            shown_likelihoods = ", ".join(f"{likelihood:.1f}" for likelihood, _ in sample["filtered_resps"])
            assert row[3].replace("\n", " ") == shown_likelihoods


@pytest.mark.slow
def test_written_answers_are_the_models_own_and_scored_by_the_task(
    tasks: Path, store: Store, no_network: list[Any]
) -> None:
    pinned = pinned_with(tasks, "write_word", limit=10, gen_kwargs={"max_gen_toks": 5})
    counts, folder, _ = scored(store, pinned, "write_word")
    model, tokenizer = start_model(pinned)
    samples = read_samples(folder, 100)
    assert len(samples) == 10 == counts["rows"]
    for sample in samples:
        ids = tokenizer.encode(prompt_of(pinned, sample["doc"]["word"]), add_special_tokens=False)
        start = len(ids)
        while len(ids) < start + 5 and tokenizer.eos_token_id not in ids[start:]:
            ids.append(int(logits_of(model, ids)[-1].argmax()))
        answer = tokenizer.decode(ids[start:], skip_special_tokens=True).split("\n\n")[0]
        assert sample["filtered_resps"] == [answer]
        assert sample["exact_match"] == float(answer == sample["doc"]["word"])
    assert no_network == []


@pytest.fixture(scope="module")
def thinker(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, ChatTemplate]:
    """A model that writes one text whatever it is asked: the next token follows from the position alone."""
    pinned = pinned_with(tasks, "write_word")
    model, tokenizer = start_model(pinned)
    template = pinned.template_arguments
    return model, tokenizer, ChatTemplate(template["source"], {}, pinned.recipe.chat_template.date, {"header": False})


def written(thinker: tuple[Any, Any, ChatTemplate], monkeypatch: pytest.MonkeyPatch, text: str, **settings: Any) -> str:
    """What lm-eval is given where the network writes `text` and the end token, and then no end of letters."""
    from lm_eval.api.instance import Instance

    from sft_core.evaluate.served_lm import ServedLM

    model, tokenizer, template = thinker
    lm = ServedLM(model, tokenizer, template, batch_size=2)
    prompt = lm.apply_chat_template([{"role": "user", "content": "copy: abc"}])
    start = len(lm.tok_encode(prompt))
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id, *tokenizer.encode("zzz" * 40)]
    forward = model.forward

    def scripted(*inputs: Any, **more: Any) -> Any:
        found = forward(*inputs, **more)
        position = more["attention_mask"].shape[1] - start
        found.logits[:, -1] = -1e9
        found.logits[:, -1, ids[position]] = 0
        return found

    monkeypatch.setattr(model, "forward", scripted)
    settings = {"until": ["\n\n"], "max_gen_toks": 100} | settings
    requests = [Instance("generate_until", {}, (prompt, dict(settings)), i) for i in range(2)]
    first, second = lm.generate_until(requests, disable_tqdm=True)
    assert first == second
    return first


def test_stop_string_inside_a_thought_ends_nothing_and_the_thought_is_left_out(
    thinker: tuple[Any, Any, ChatTemplate], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert written(thinker, monkeypatch, "<think>\na\n\nb\n</think>\n\nabc\n\nmore") == "abc"


def test_stop_string_ends_an_answer_without_a_thought(
    thinker: tuple[Any, Any, ChatTemplate], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert written(thinker, monkeypatch, " abc\n\nmore") == " abc", "white space of an answer is left as it is"


def test_thought_that_never_ends_is_no_answer(
    thinker: tuple[Any, Any, ChatTemplate], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert written(thinker, monkeypatch, "<think>\nabc\n\nabc", max_gen_toks=10) == ""


def test_stop_in_answer_begins_inside_a_thought_that_the_prompt_opens(thinker: tuple[Any, Any, ChatTemplate]) -> None:
    from sft_core.evaluate.served_lm import StopInAnswer

    tokenizer = thinker[1]
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    done = {}
    for prompt in ("say<think>\n", "say<think>\n\n</think>\n"):
        ids = encode(prompt)
        stop = StopInAnswer(tokenizer, ["b"], torch.tensor([ids]))
        done[prompt] = []
        for token in encode("ab</think>ab"):
            ids = [*ids, token]
            done[prompt].append(bool(stop(torch.tensor([ids]), None)[0]))
    opened, closed = done.values()
    assert opened == [False] * (len(opened) - 1) + [True], "after the thought alone"
    assert closed[1] and not closed[0]


@pytest.mark.slow
def test_prompt_longer_than_the_context_is_counted_as_cut(tasks: Path, store: Store) -> None:
    pinned = pinned_with(tasks, "write_word", limit=3, system_instruction="lumr " * 200)
    counts, _, _ = scored(store, pinned, "write_word")
    assert counts["cut"] == counts["prompts"] == 3
    assert scored(store, pinned_with(tasks, "write_word", limit=3), "write_word")[0]["cut"] == 0


def builds(store: Store) -> int:
    return len((store.root / "builds.jsonl").read_text().splitlines())


@pytest.mark.slow
def test_second_ensure_makes_nothing_and_another_task_leaves_the_first(tasks: Path, store: Store) -> None:
    one = pinned_with(tasks, "which_word", limit=4)
    _, _, ref = scored(store, one, "which_word")
    before = builds(store)
    assert scored(store, pinned_with(tasks, "which_word", limit=4), "which_word")[2] == ref and builds(store) == before
    both = pinned_with(tasks, "which_word", "write_word", limit=4)
    assert scored(store, both, "which_word")[2] == ref and builds(store) == before
    scored(store, both, "write_word")
    assert builds(store) == before + 1


@pytest.mark.parametrize(
    "change",
    [
        {"limit": 5},
        {"num_fewshot": 2},
        {"apply_chat_template": False},
        {"system_instruction": "Copy."},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"gen_kwargs": {"max_gen_toks": 9}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_key_changes_with_what_is_asked(tasks: Path, store: Store, change: dict[str, Any]) -> None:
    part = {"model": "base", "task": "write_word"}
    plain, changed = (store.locate(HARNESS, pinned_with(tasks, "write_word", **more), part) for more in ({}, change))
    assert plain.ref != changed.ref


@pytest.mark.slow
def test_plain_prompts_and_examples_are_as_asked(tasks: Path, store: Store) -> None:
    pinned = pinned_with(tasks, "write_word", limit=2, num_fewshot=2, apply_chat_template=False)
    counts, folder, _ = scored(store, pinned, "write_word")
    assert counts["num_fewshot"] == 2
    for sample in read_samples(folder, 2):
        asked = sample["arguments"][0][0]
        assert "<|im_start|>" not in asked
        assert asked.count("copy: ") == 3 and asked.endswith(f"copy: {sample['doc']['word']}")


def test_scores_of_a_group_are_its_own_and_of_a_tag_its_members() -> None:
    members = {"a": {"acc,none": 0.25, "acc_stderr,none": 0.1}, "b": {"acc,none": 0.75, "acc_stderr,none": "N/A"}}
    counts = {"a": {"original": 9, "effective": 4}, "b": {"original": 9, "effective": 6}}
    rows = {**members, "both": {"alias": "both", "name": "both", "acc,none": 0.55, "acc_stderr,none": 0.05}}
    (own,) = scores_of({"results": rows, "n-samples": counts}, "both")
    assert (own.metric, own.value, own.stderr, own.n) == ("acc", 0.55, 0.05, 10)
    found = scores_of({"results": {**members, "t": {"alias": "t", "name": "t"}}, "n-samples": counts}, "t")
    assert [(one.metric, one.value, one.stderr, one.n) for one in found] == [
        ("a acc", 0.25, 0.1, 4),
        ("b acc", 0.75, None, 6),
    ]
    filtered = {"x": {"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1, "sample_len": 4}}
    (one,) = scores_of({"results": filtered, "n-samples": {"x": {"effective": 4}}}, "x")
    assert (one.metric, one.value, one.stderr) == ("exact_match,strict", 0.5, 0.1)
    with pytest.raises(ValueError, match="gave no score"):
        scores_of({"results": {"x": {"alias": "x"}}, "n-samples": {"x": {"effective": 4}}}, "x")
