"""A task's scores, made by the real stages over a few quickstart rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from sft_core.data.shards.token_shards import TokenShards, read_index
from sft_core.data.sources import splits
from sft_core.evaluate import tasks
from sft_core.evaluate.rows import of_samples, read_rows
from sft_core.evaluate.scores import mean_score, perplexity, token_accuracy, token_loss
from sft_core.evaluate.tasks import build_evaluated, row_losses
from sft_core.pins.pinned import PinnedRecipe, pin
from sft_core.recipe.parse import parse_recipe
from sft_core.store.stage import Build
from sft_core.store.store import Store
from sft_core.train.job import ModelLoader, TokenizerLoader
from sft_core.train.models.model import load_model, save_checkpoint
from steps.cards.task import card
from steps.evaluate import EVALUATED
from steps.tokenize import TOKENS
from tests.train.tiny import LLAMA, OPT, tiny_recipe

TASK = "checksum_think"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def pinned() -> PinnedRecipe:
    return pin(parse_recipe(tiny_recipe(evaluation={"max_rows": 12, "max_new_tokens_by_task": {TASK: 5}})))


@pytest.fixture(scope="module")
def scored(store: Store, pinned: PinnedRecipe) -> Path:
    return store.path(store.ensure(EVALUATED, pinned, model="base", task=TASK))


@pytest.fixture(scope="module")
def tokens(store: Store, pinned: PinnedRecipe) -> Path:
    return store.path(store.ensure(TOKENS, pinned, source=TASK))


def start_model(pinned: PinnedRecipe) -> Any:
    return load_model(
        ModelLoader(**pinned.model_loader),
        TokenizerLoader(**pinned.tokenizer_loader),
        seed=pinned.recipe.last_phase.training.seed,
    )


@pytest.mark.slow
def test_evaluated_rows_are_report_rows_with_their_loss(scored: Path, tokens: Path, pinned: PinnedRecipe) -> None:
    rows, index = read_rows(scored), read_index(tokens)
    assert rows.num_rows == 12
    hashes = rows["prompt_hash"].to_numpy()
    assert len(np.unique(hashes)) == 12
    assert (splits.assign(hashes, selection_share=0.05, report_share=0.3) == splits.REPORT).all()
    places = [index["row_id"].to_pylist().index(row_id) for row_id in rows["row_id"].to_pylist()]
    token_rows = [TokenShards(tokens)[place] for place in places]
    model, _ = start_model(pinned)
    expected = [row_losses(model.eval(), [row]) for row in token_rows]
    assert rows["nll"].to_pylist() == pytest.approx([nll[0] for nll, _ in expected], rel=1e-4)
    assert rows["num_correct"].to_pylist() == [num_correct[0] for _, num_correct in expected]
    assert rows["num_trained"].to_pylist() == [int(row.trained.sum()) for row in token_rows]
    assert rows["answer"].to_pylist() == [index["answer"][place].as_py() for place in places]


def test_evaluated_scores_follow_from_the_rows(scored: Path, store: Store) -> None:
    rows, found = read_rows(scored).to_pydict(), json.loads((scored / "scores.json").read_text())
    loss = token_loss(np.array(rows["nll"]), np.array(rows["num_trained"]))
    accuracy = token_accuracy(np.array(rows["num_correct"]), np.array(rows["num_trained"]))
    match = mean_score("exact_match", np.array(rows["score"]))
    assert found == [vars(loss), vars(perplexity(loss)), vars(accuracy), vars(match)]
    counts = json.loads((scored / "manifest.json").read_text())["counts"]
    lengths, cut_off = ([value[0] for value in rows[name]] for name in ("num_generated", "cut_off"))
    assert counts == {
        **{"rows": 12, "over_long": 0, "answers": 12, "empty": 0, "timeouts": 0, "metric": "exact_match"},
        **{"cut_off": sum(cut_off), "generated_tokens": round(sum(lengths) / 12, 2), "scores": found},
        "engine": f"transformers {transformers.__version__}",
    }


def evaluate_checkpoint(pinned: PinnedRecipe, tokens: Path, trained: Path, out: Path, **changes: Any) -> Any:
    """The rows of build_evaluated for a checkpoint that is no output of the store."""
    part = {"model": "tuned", "task": TASK}
    arguments = EVALUATED.section(pinned, part) | EVALUATED.loaders(pinned, part) | changes
    assert arguments["model"] is None
    out.mkdir()
    build_evaluated(Build(out, {"tokens": tokens, "trained": trained}, pinned.recipe.runtime), **arguments)
    return read_rows(out)


@pytest.fixture(scope="module")
def writes_four(pinned: PinnedRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that answers `4` and stops, whatever it is asked: the next token follows from the last alone."""
    loader = pinned.model_loader
    config = {**loader["config"], "tie_word_embeddings": False}
    model, tokenizer = load_model(
        ModelLoader(**{**loader, "config": config}), TokenizerLoader(**pinned.tokenizer_loader), seed=0
    )
    (four,) = tokenizer.encode("4", add_special_tokens=False)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if not name.endswith("norm.weight"):
                weights.zero_()
        model.get_input_embeddings().weight[:, 0] = 1
        model.get_input_embeddings().weight[four] = torch.eye(32)[1]
        model.get_output_embeddings().weight[four, 0] = 1
        model.get_output_embeddings().weight[tokenizer.eos_token_id, 1] = 1
    trained = tmp_path_factory.mktemp("trained")
    save_checkpoint(model, tokenizer, pinned.template_text, trained / "model")
    return trained


def test_evaluated_answer_that_stops_is_compared_without_its_stop_token(
    writes_four: Path, tokens: Path, pinned: PinnedRecipe, tmp_path: Path
) -> None:
    rows = evaluate_checkpoint(pinned, tokens, writes_four, tmp_path / "out", max_rows=100)
    assert set(of_samples(rows, "outputs")) == {"4"} and set(of_samples(rows, "num_generated")) == {2}
    assert not any(of_samples(rows, "cut_off"))
    wanted = rows["answer"].to_pylist()
    assert 1 <= wanted.count("4") < len(wanted)
    assert rows["score"].to_pylist() == [float(answer == "4") for answer in wanted]
    assert json.loads((tmp_path / "out" / "scores.json").read_text())[-1]["value"] == wanted.count("4") / len(wanted)


def test_evaluated_answer_without_room_to_stop_is_cut_off(
    writes_four: Path, tokens: Path, pinned: PinnedRecipe, tmp_path: Path
) -> None:
    rows = evaluate_checkpoint(pinned, tokens, writes_four, tmp_path / "out", max_new_tokens=1)
    assert set(of_samples(rows, "outputs")) == {"4"} and set(of_samples(rows, "num_generated")) == {1}
    assert all(of_samples(rows, "cut_off"))


def test_evaluated_without_report_rows_is_an_error(tokens: Path, pinned: PinnedRecipe, tmp_path: Path) -> None:
    section = EVALUATED.section(pinned, {"model": "base", "task": TASK})
    arguments = section | EVALUATED.loaders(pinned, {"model": "base", "task": TASK}) | {"report_share": 0.0}
    arguments["smoke"] = False
    build = Build(tmp_path, {"tokens": tokens}, pinned.recipe.runtime)
    with pytest.raises(ValueError, match=r"no report rows of at most \d+ tokens; raise dataset_mixture\.report_share"):
        build_evaluated(build, **arguments)
    assert build_evaluated(build, **arguments | {"smoke": True})["rows"] == 12, "a smoke run scores what it has"


@pytest.mark.slow
def test_rows_whose_loss_is_not_finite_are_named(
    tokens: Path, pinned: PinnedRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(model: Any, rows: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        sums, num_correct = row_losses(model, rows)
        sums[3] = np.nan
        return sums, num_correct

    part = {"model": "base", "task": TASK}
    arguments = EVALUATED.section(pinned, part) | EVALUATED.loaders(pinned, part)
    build = Build(tmp_path, {"tokens": tokens}, pinned.recipe.runtime)
    build_evaluated(build, **arguments)
    row_id = read_rows(tmp_path)["row_id"][3].as_py()
    monkeypatch.setattr(tasks, "row_losses", spoiled)
    with pytest.raises(ValueError, match=f"loss of 1 of 12 rows is not finite under .*: {row_id}; look at"):
        build_evaluated(build, **arguments)


@pytest.mark.slow
def test_evaluated_rows_over_max_length_are_left_out_and_counted(
    tokens: Path, pinned: PinnedRecipe, tmp_path: Path
) -> None:
    part = {"model": "base", "task": TASK}
    arguments = EVALUATED.section(pinned, part) | EVALUATED.loaders(pinned, part) | {"max_rows": 1000}
    lengths = read_index(tokens)["num_tokens"].to_numpy()
    bound = int(np.median(lengths)) - 1
    assert lengths.min() <= bound < lengths.max()
    counts = []
    for number, max_length in enumerate((int(lengths.max()), bound)):
        (tmp_path / str(number)).mkdir()
        build = Build(tmp_path / str(number), {"tokens": tokens}, pinned.recipe.runtime)
        counts.append(build_evaluated(build, **arguments | {"max_length": max_length}))
    assert counts[0]["over_long"] == 0 < counts[1]["over_long"]
    assert counts[1]["rows"] + counts[1]["over_long"] == counts[0]["rows"]


def test_evaluated_checkpoint_of_the_start_model_scores_as_the_start_model(
    scored: Path, tokens: Path, pinned: PinnedRecipe, tmp_path: Path
) -> None:
    model, tokenizer = start_model(pinned)
    save_checkpoint(model, tokenizer, pinned.template_text, tmp_path / "trained" / "model")
    rows = evaluate_checkpoint(pinned, tokens, tmp_path / "trained", tmp_path / "out")
    assert rows.equals(read_rows(scored))


@pytest.mark.slow
def test_evaluated_model_in_which_packed_rows_see_each_other_says_so(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    cards = []
    for config in (LLAMA, OPT):
        recipe = tiny_recipe(model={"config": config}, evaluation={"max_rows": 3, "max_new_tokens": 1})
        caplog.clear()
        ref = store.ensure(EVALUATED, pin(parse_recipe(recipe)), model="base", task=TASK)
        alone = config is OPT
        assert ("documents=alone: packed rows see each other" in caplog.text) is alone
        assert store.manifest(ref)["counts"].get("documents") == ("alone" if alone else None)
        cards.append(json.dumps([component.render() for component in card(store, {"base": ref, "tuned": ref})]))
    assert ["they see each other in this model" in shown for shown in cards] == [False, True]


def test_evaluated_whole_rows_trained_have_a_loss_and_no_answer(store: Store) -> None:
    recipe = tiny_recipe(training={"loss_scope": "all"}, evaluation={"max_rows": 4})
    ref = store.ensure(EVALUATED, pin(parse_recipe(recipe)), model="base", task=TASK)
    rows = read_rows(store.path(ref))
    assert rows.num_rows == 4
    assert rows["answer"].null_count == 0
    assert rows["outputs"].null_count == rows["score"].null_count == 4
    assert [score["metric"] for score in store.manifest(ref)["counts"]["scores"]] == [
        "loss",
        "perplexity",
        "token_accuracy",
    ]
