"""Losses on the selection split while training goes on: right, without a trace in the training, and of use."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState

from sft_core.data.shards.token_shards import TokenShards, read_index
from sft_core.data.sources import splits
from sft_core.evaluate.tasks import row_losses
from sft_core.pins.pinned import PinnedRecipe, pin
from sft_core.recipe.parse import parse_recipe
from sft_core.store.store import Store
from sft_core.train.assemble import log_balance
from sft_core.train.checkpoints import numbered, step_of
from sft_core.train.log_file import read_events
from sft_core.train.row_losses import RowLosses
from sft_core.train.schedule import EMPTY
from sft_core.train.selection import EvaluateSelection, Selection, SelectionLosses, evaluation_steps
from steps.cards.training import card
from steps.selection import SELECTION
from steps.tokenize import TOKENS
from steps.train import TRAINED
from tests.browser import Browser
from tests.train.tiny import LLAMA, SOURCES, Run, tiny_recipe

NUM_STEPS = 8
SELECTION_ROWS = {"evaluation": {"during_training": {"every_epochs": 0.5, "max_rows": 12}}}
MIXTURE = {"dataset_mixture": {"selection_share": 0.2}}
# It learns, then a rate that is far too high spoils it: the best step is neither the first nor the last.
SPOILT = {"training": {"max_steps": NUM_STEPS, "learning_rate": 0.1, "lr_scheduler_type": "constant"}}


def measured(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "logs" / "selection.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def watched(train_here: Callable[..., Run]) -> Run:
    return train_here(tiny_recipe(**MIXTURE, **SELECTION_ROWS))


def test_selection_steps_are_the_start_each_part_of_an_epoch_and_the_end():
    assert evaluation_steps(6, 1.75, 0.5) == [0, 1, 2, 3, 4, 5, 6]
    assert evaluation_steps(100, 100, 0.25) == [0, 25, 50, 75, 100]
    assert evaluation_steps(10, 8, 1) == [0, 8, 10]
    assert evaluation_steps(2, 100, 0.25) == [0, 2]


@pytest.mark.slow
def test_selection_rows_are_unique_held_out_prompts_that_are_not_trained_on(store: Store, watched: Run):
    folder = store.path(store.ensure(SELECTION, watched.pinned))
    plan = pq.read_table(folder / "packs.parquet").to_pandas()
    shares = {"selection_share": 0.2, "report_share": 0.3}
    for number, source in enumerate(SOURCES):
        index = read_index(store.path(store.ensure(TOKENS, watched.pinned, source=source)))
        rows = np.sort(plan["row"][plan["source"] == number])
        hashes = index["prompt_hash"].to_numpy()
        in_split = splits.assign(hashes, **shares) == splits.SELECTION
        assert len(rows) == min(12, len(np.unique(hashes[in_split]))) > 0
        assert in_split[rows].all()
        assert len(np.unique(hashes[rows])) == len(rows)


def losses_of(model_folder: Path, store: Store, pinned: PinnedRecipe) -> dict[str, float]:
    """Loss of each source's selection rows, each row by itself."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    plan = pq.read_table(store.path(store.ensure(SELECTION, pinned)) / "packs.parquet").to_pandas()
    losses = {}
    for number, source in enumerate(SOURCES):
        shards = TokenShards(store.path(store.ensure(TOKENS, pinned, source=source)))
        rows = [shards[row] for row in plan["row"][plan["source"] == number]]
        losses[source] = row_losses(model, rows)[0].sum() / sum(int(row.trained[1:].sum()) for row in rows)
    return losses


def test_selection_losses_are_those_of_each_row_by_itself(store: Store, watched: Run):
    events = measured(watched)
    assert [event["step"] for event in events] == evaluation_steps(6, 7 / 4, 0.5)
    assert events[0]["loss"] > 1.2 * events[-1]["loss"], "it learns"
    assert store.manifest(store.ensure(SELECTION, watched.pinned))["counts"]["packs"] > 1
    expected = losses_of(watched.model, store, watched.pinned)
    assert events[-1]["losses"] == pytest.approx(expected, rel=1e-5)
    assert events[-1]["loss"] == pytest.approx(np.mean(list(expected.values())))


@pytest.mark.slow
def test_selection_losses_leave_the_training_as_it_is(train_here: Callable[..., Run], watched: Run):
    dropout = {"model": {"config": {**LLAMA, "attention_dropout": 0.2}}}
    alone = train_here(tiny_recipe(**MIXTURE, **dropout))
    beside = train_here(tiny_recipe(**MIXTURE, **dropout, **SELECTION_ROWS))

    assert len(measured(beside)) > 3
    assert len(beside.events) == 6
    assert [event["loss"] for event in beside.events] == [event["loss"] for event in alone.events]
    assert beside.events[-1]["loss"] != watched.events[-1]["loss"], "dropout is on"
    one, other = (load_file(run.model / "model.safetensors") for run in (alone, beside))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_selection_keep_best_ends_with_the_weights_of_the_lowest_loss(store: Store, train_here: Callable[..., Run]):
    during = {**SELECTION_ROWS["evaluation"]["during_training"], "keep_best": True}
    recipe = tiny_recipe(**MIXTURE, **SPOILT, evaluation={"during_training": during}, runtime={"keep_checkpoints": 1})
    run = train_here(recipe)
    events = measured(run)
    best = min(events[1:], key=lambda event: event["loss"])
    assert 0 < best["step"] < NUM_STEPS - 1, events

    kept = {step_of(path) for path in numbered(run.folder / "checkpoints")}
    assert kept == {best["step"], NUM_STEPS}
    stored = load_file(run.folder / "checkpoints" / f"checkpoint-{best['step']}" / "model.safetensors")
    ended = load_file(run.model / "model.safetensors")
    assert all(torch.equal(stored[name], ended[name]) for name in ended)
    last = load_file(run.folder / "checkpoints" / f"checkpoint-{NUM_STEPS}" / "model.safetensors")
    assert any(not torch.equal(last[name], ended[name]) for name in ended)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_selection_keep_best_on_two_ranks(strategy: str, store: Store, tmp_path: Path):
    during = {**SELECTION_ROWS["evaluation"]["during_training"], "keep_best": True}
    runtime = {"num_processes": 2, "distributed": strategy}
    data = tiny_recipe(**MIXTURE, **SPOILT, evaluation={"during_training": during}, runtime=runtime)
    pinned = pin(parse_recipe(data))
    run = Run(pinned, tmp_path / "run")
    store.path(store.ensure(TRAINED, pinned, round=0)).rename(run.folder)  # else it is a hit for the next strategy
    events = measured(run)
    best = min(events[1:], key=lambda event: event["loss"])
    assert 0 < best["step"] < NUM_STEPS, events
    assert best["losses"] == pytest.approx(losses_of(run.model, store, pinned), rel=1e-4)


def test_selection_best_is_never_the_start(tmp_path: Path):
    losses = iter([1.0, 3.0, 2.0, 2.0])  # at steps 0 to 3

    def measure() -> RowLosses:
        return RowLosses(np.array([next(losses)]), np.array([1.0]), np.array([0]))

    selection = Selection(SelectionLosses(None), ["a"], [0, 1, 2, 3], tmp_path / "log", keep_best=True)  # type: ignore[arg-type]
    callback = EvaluateSelection(selection, measure, lambda folder: None, is_over=lambda: False)
    callback.begin(0, writes=True)
    state, saved = TrainerState(is_world_process_zero=True, max_steps=3), []
    callback.on_train_begin(None, state, TrainerControl())  # type: ignore[arg-type]
    for state.global_step in (1, 2, 3):
        control = TrainerControl()
        callback.on_step_end(None, state, control)  # type: ignore[arg-type]
        saved.append(control.should_save)
    assert state.best_global_step == 2
    assert saved == [True, True, False]


@pytest.mark.slow
def test_selection_source_without_rows_is_an_error(store: Store):
    recipe = tiny_recipe(dataset_mixture={"selection_share": 1e-6}, **SELECTION_ROWS)
    del recipe["limit"]
    with pytest.raises(ValueError, match="copy_no_think has no selection row"):
        store.ensure(SELECTION, pin(parse_recipe(recipe)))


def test_selection_of_a_smoke_run_takes_training_rows(store: Store, caplog: pytest.LogCaptureFixture):
    recipe = tiny_recipe(dataset_mixture={"selection_share": 1e-6}, **SELECTION_ROWS)
    ref = store.ensure(SELECTION, pin(parse_recipe(recipe)))
    assert store.manifest(ref)["counts"]["sources"][SOURCES[0]]["rows"] == 12
    assert "this smoke run takes training rows" in caplog.text


def test_selection_without_a_split_is_refused():
    with pytest.raises(ValueError, match="no prompt is in the selection split"):
        parse_recipe(tiny_recipe(dataset_mixture={"selection_share": 0.0}, **SELECTION_ROWS))


@pytest.mark.slow
def test_card_of_a_training_shows_what_its_logs_say(watched: Run, browser: Browser):
    page = browser.card(card(watched.folder))
    assert page.errors == []
    told, by_source, last_events, lowest, held_out = page.tables
    last, shown = watched.events[-1], dict(told)
    assert shown["step"] == f"{last['step']} of {last['of']}" and shown["loss"] == f"{last['loss']:.4f}"
    seconds = f"{sum(event['seconds'] for event in watched.events):.0f}"
    assert shown["time so far"] == f"{seconds} second{'' if seconds == '1' else 's'}" and "time to go" not in shown
    assert float(shown["gradient norm"]) == pytest.approx(last["grad_norm"], rel=0.01)
    assert (shown["attention"], shown["packs a forward"]) == ("sdpa", "1")
    assert shown["documents of a pack"] == "together, apart from each other"
    losses = {source: [event[f"loss/{source}"] for event in watched.events] for source in SOURCES}
    wanted = {(s, *(f"{loss:.4f}" for loss in (of[0], min(of), of[-1]))) for s, of in losses.items()}
    assert by_source[0] == ["source", "first loss", "lowest", "last"] and set(map(tuple, by_source[1:])) == wanted
    assert last_events[0] == ["step", "loss", "learning rate", "gradient norm", "tokens/s", "trained tokens/s"]
    seen = [(f"{event['step']}", f"{event['loss']:.4f}", f"{event['tokens_per_s']:,.0f}") for event in watched.events]
    assert [(row[0], row[1], row[4]) for row in last_events[1:]] == seen
    best = min(measured(watched)[1:], key=lambda event: event["loss"])
    assert lowest[-1][1] == f"{best['loss']:.4f} at step {best['step']}"
    assert {row[0] for row in held_out[1:]} == set(SOURCES)
    training, sources, speeds, selection, selection_sources = page.charts
    assert [value["loss"] for value in training.values] == [event["loss"] for event in watched.events]
    assert [value["loss"] for value in selection.values] == [event["loss"] for event in measured(watched)]
    own = [
        value["loss"] for value in sources.values if value["source"] == SOURCES[0] and value["kind"] == "this source"
    ]
    assert own == losses[SOURCES[0]]
    own = [value["loss"] for value in selection_sources.values if value["kind"] == "this source"]
    assert sorted(own) == sorted(loss for event in measured(watched) for loss in event["losses"].values())
    assert {value["measure"] for value in speeds.values} == set(last_events[0][2:])
    for chart in page.charts:
        assert chart.marks["line"] and any("step" in title for title in chart.axes)


def test_schedule_on_one_rank_is_even(watched: Run):
    (told,) = read_events(watched.folder / "logs" / "balance.jsonl")
    assert told == {"ranks": 1, "packs_a_step": 4, "slowest_over_mean": 1.0}


def test_balance_that_is_told_counts_empty_slots_and_where_ranks_wait(tmp_path: Path):
    costs, schedule = np.array([4.0, 1.0, 1.0, 2.0, 8.0]), np.array([[0, 1, 2, 3], [4, EMPTY, EMPTY, EMPTY]])
    for strategy, slowest in (("ddp", 5 + 8), ("zero3", 4 + 2 + 8)):  # rank 0 has 4 + 1, rank 1 has 1 + 2
        log_balance(tmp_path / "balance.jsonl", costs, schedule, 2, strategy)
        (told,) = read_events(tmp_path / "balance.jsonl")
        assert told == {"ranks": 2, "packs_a_step": 4, "slowest_over_mean": pytest.approx(slowest / (4 + 4), abs=1e-6)}
