"""A search that trains for real: roll-outs as outputs of the store, from one another's weights."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from sft_core.data.packing.plan import PackPlan
from sft_core.pins.pinned import PinnedRecipe, pin
from sft_core.recipe.parse import parse_recipe
from sft_core.recipe.wording import counted
from sft_core.rounds import ONLY
from sft_core.search.evaluations import evaluation_folder
from sft_core.search.job import RolloutJob
from sft_core.search.journal import CURVES, read_journal
from sft_core.search.rollouts import Curves, Decision
from sft_core.store.stage import Unresolved
from sft_core.store.store import Store
from sft_core.train.checkpoints import numbered
from sft_core.train.job import job_path, read_job, write_job
from steps.cards.search import card
from steps.mix import MIXTURE
from steps.pack import PACKED
from steps.plan import plan
from steps.search import Searched, progress
from steps.selection import SELECTION
from steps.train import CHECKPOINT, TRAINED
from tests.browser import Browser
from tests.train.tiny import ROOT, SOURCES, tiny_recipe

pytestmark = pytest.mark.slow

SEARCH = {"strategy": "msft", "epochs_per_rollout": 2.0, "evaluations_per_epoch": 2, "max_rows": 10}
OWN: dict[str, dict[str, Any]] = {
    "msft": {"preset": "paper", "max_rollouts": 3},
    "dynamix": {"dynamix": {"every_steps": 3}, "epochs_per_rollout": 4.0},
    "ies": {"ies": {"delta": 0.3}, "epochs_per_rollout": 7.0},
    "sft": {"score": "answers"},
}


def recipe(**search: Any) -> dict[str, Any]:
    data = tiny_recipe(
        dataset_mixture={"selection_share": 0.2},
        training={"learning_rate": 0.02, "lr_scheduler_type": "constant"},
        search={**SEARCH, **OWN.get(search.get("strategy", "msft"), {}), **search},
    )
    del data["training"]["num_train_epochs"]
    return data


def run(store: Store, data: dict[str, Any]) -> Searched:
    """What the flow's train step does until the search is over."""
    pinned = pin(parse_recipe(data))
    store.ensure(MIXTURE, pinned)
    for _ in range(12):
        found = progress(store, pinned).searches[ONLY]
        if found.is_over:
            return found
        store.ensure(TRAINED, found.pinned, round=len(found.rounds.rollouts) - 1)
    raise AssertionError("it does not end")


def decisions(found: Searched) -> list[Decision]:
    return [one.decision for one in found.measured]


def folder_of(store: Store, pinned: PinnedRecipe, round: int) -> Path:
    located = store.locate(TRAINED, pinned, {"round": round})
    assert located.status == "hit" and located.ref is not None
    return store.path(located.ref)


def curves_of(store: Store, pinned: PinnedRecipe, round: int) -> Curves:
    with (folder_of(store, pinned, round) / CURVES).open() as file:
        return read_journal(file)[0]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def searched(store: Store) -> Searched:
    return run(store, recipe())


def test_search_drops_a_task_and_rolls_back(searched: Searched):
    dropped = [task for decision in decisions(searched) for task in decision.dropped]
    assert len(dropped) >= 1, decisions(searched)
    assert searched.ended_by == "max_rollouts: 3 roll-outs done"
    rollouts = searched.rounds.rollouts
    for rollout, decision in zip(rollouts[1:], decisions(searched), strict=False):
        assert rollout.start == decision.start
        assert not set(decision.dropped) & set(rollout.active)
    last = decisions(searched)[[bool(one.dropped) for one in decisions(searched)].index(True)]
    assert last.start.evaluation < 4, "it went back"


def test_search_round_starts_with_the_weights_that_it_rolled_back_to(store: Store, searched: Searched):
    for rollout in searched.rounds.rollouts[1:]:
        assert rollout.start is not None
        before, after = (curves_of(store, searched.pinned, n) for n in (rollout.start.round, rollout.round))
        for task in SOURCES:
            assert np.array_equal(after.rows[task][0], before.rows[task][rollout.start.evaluation])


def test_search_round_trains_the_active_tasks_and_measures_all(store: Store, searched: Searched):
    for rollout in searched.rounds.rollouts:
        part = TRAINED.needs(searched.pinned, {"round": rollout.round})["packs"][1]
        packs = PackPlan.read(store.path(store.ensure(PACKED, searched.pinned, **part)))
        assert {SOURCES[number] for number in packs.source} == set(rollout.active)
        assert set(curves_of(store, searched.pinned, rollout.round).rows) == set(SOURCES)
    assert min(len(rollout.active) for rollout in searched.rounds.rollouts) == 1


def test_search_keeps_no_weights_but_those_that_are_asked_for(store: Store, searched: Searched):
    asked = {searched.rounds.best, *(decision.start for decision in decisions(searched))}
    for rollout in searched.rounds.rollouts:
        folder = folder_of(store, searched.pinned, rollout.round)
        kept = {int(path.name) for path in (folder / "evaluations").iterdir()}
        assert {point.evaluation for point in asked if point.round == rollout.round} <= kept
        assert len(kept) <= 2, "where it goes on, and the best so far"
        assert sorted(path.name for path in folder.iterdir()) == [CURVES, "evaluations", "logs", "manifest.json"]


def test_search_delivers_the_best_pooled_evaluation(store: Store, searched: Searched):
    best = max(
        (curves_of(store, searched.pinned, rollout.round).pooled().max(), -rollout.round)
        for rollout in searched.rounds.rollouts
    )
    point = searched.rounds.best
    assert point is not None and point.round == -best[1]
    assert curves_of(store, searched.pinned, point.round).pooled()[point.evaluation] == best[0]
    model = store.path(store.ensure(CHECKPOINT, searched.pinned)) / "model"
    kept = evaluation_folder(folder_of(store, searched.pinned, point.round), point.evaluation)
    assert {path.name for path in model.iterdir()} == {path.name for path in kept.iterdir()}
    assert (model / "model.safetensors").samefile(kept / "model.safetensors")


def test_search_counts_what_it_cost(store: Store, searched: Searched):
    for rollout, measured in zip(searched.rounds.rollouts, searched.measured, strict=True):
        cost, folder = measured.cost, folder_of(store, searched.pinned, rollout.round)
        events = [json.loads(line) for line in (folder / "logs" / "selection.jsonl").read_text().splitlines()]
        assert cost.most_kept == max(len(event["kept"]) for event in events) <= 4
        part = TRAINED.needs(searched.pinned, {"round": rollout.round})["packs"][1]
        tokens = store.manifest(store.ensure(PACKED, searched.pinned, **part))["counts"]["tokens"]
        held_out = store.manifest(store.ensure(SELECTION, searched.pinned))["counts"]["tokens"]
        # Almost linear at this length: a token evaluated takes a third of one trained.
        ratio = len(events) * held_out / 3 / (rollout.epochs * tokens)
        assert cost.evaluation_flops / cost.training_flops == pytest.approx(ratio, rel=0.2)
        lengths = PackPlan.read(store.path(store.ensure(PACKED, searched.pinned, **part))).num_tokens.astype(float)
        num_trained = store.manifest(store.ensure(MIXTURE, searched.pinned, **part))["counts"]["trained_tokens"]
        layers = 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
        an_epoch = 6 * (layers * tokens + 2 * 32 * (lengths**2).sum() + 291 * 32 * num_trained)
        assert cost.training_flops == pytest.approx(rollout.epochs * an_epoch)


def test_search_with_a_larger_cap_goes_on(store: Store, searched: Searched):
    before = store.locate(TRAINED, searched.pinned, {"round": 2}).ref
    larger = progress(store, pin(parse_recipe(recipe(max_rollouts=4)))).searches[ONLY]
    assert (len(larger.rounds.rollouts), larger.is_over) == (4, False)
    assert store.locate(TRAINED, larger.pinned, {"round": 2}).ref == before
    assert decisions(larger) == decisions(searched)
    smaller = progress(store, pin(parse_recipe(recipe(max_rollouts=1)))).searches[ONLY]
    assert (len(smaller.rounds.rollouts), smaller.is_over) == (1, True)


def test_search_plan_shows_what_is_known(store: Store, searched: Searched, tmp_path: Path):
    def shown(store: Store, **search: Any) -> dict[tuple[str, str], str]:
        found = plan(store, pin(parse_recipe(recipe(**search))))
        names = ("trained", "checkpoint", "report")
        return {(one.stage.name, one.name): one.status for one in found if one.stage.name in names}

    finished = shown(store)
    point = searched.rounds.best
    assert point is not None
    assert all(finished["trained", str(number)] == "hit" for number in range(point.round + 1))
    assert finished["report", "-"] == "depends"
    nothing = shown(Store(tmp_path))
    assert nothing["trained", "0"] == "depends" and nothing["checkpoint", "-"] == "depends"
    undecided = progress(Store(tmp_path), pin(parse_recipe(recipe()))).searches[ONLY].pinned
    with pytest.raises(Unresolved):
        CHECKPOINT.section(undecided, {})


def test_search_card_shows_the_rollouts_peaks_and_decisions(store: Store, searched: Searched, browser: Browser):
    page = browser.card(card(progress(store, pin(parse_recipe(recipe()))), ONLY))
    assert page.errors == []
    facts, told, evidence = page.tables
    shown = {name.replace("\n", " "): value.replace("\n", " ") for name, value in facts}
    assert shown["strategy"] == "msft (paper)" and shown["roll-outs"] == str(len(searched.measured))
    training, evaluation = (
        sum(getattr(one.cost, f"{what}_flops") for one in searched.measured) for what in ("training", "evaluation")
    )
    assert shown["training, PFLOPs"].startswith(f"{training / 1e15:.4g}; ")
    assert shown["evaluation beside it, PFLOPs"] == f"{evaluation / 1e15:.4g} ({evaluation / training:.0%} of training)"
    kept = searched.measured[-1].decision.epochs
    first = searched.measured[0]
    plain = first.cost.training_flops / first.curves.epochs[-1] * kept
    assert f"; {training / plain:.2f} x plain SFT of {kept:g} epochs" in shown["training, PFLOPs"]
    for row, rollout, one in zip(told[1:], searched.rounds.rollouts, searched.measured, strict=True):
        row = [cell.replace("\n", " ") for cell in row]
        assert row[0].startswith(f"{rollout.round}, from ") and row[1].endswith(f" of {rollout.epochs:g} epochs")
        out = [task for task in searched.pinned.recipe.sources if task not in rollout.active]
        assert all(name in row[1] for name in (out if len(out) < len(rollout.active) else rollout.active))
        assert row[2] == (", ".join(one.decision.dropped) or "nobody")
        assert row[4] == one.decision.reason
    last = searched.measured[-1]
    assert {row[0]: row[1] for row in evidence[1:]} == {
        task: str(found["peak"]) for task, found in last.decision.evidence.items()
    }
    (chart,) = page.charts
    peaks = {(value["rollout"], value["task"], value["epoch"]) for value in chart.values if value["is_peak"]}
    assert peaks == {
        (f"roll-out {number}", task, one.curves.epochs[found["peak"]])
        for number, one in enumerate(searched.measured)
        for task, found in one.decision.evidence.items()
    }


LAUNCHER = """
import json, sys
from sft_core.pins.pinned import pin
from sft_core.recipe.parse import parse_recipe
from sft_core.store.store import Store
from steps.mix import MIXTURE
from steps.search import progress
from steps.train import TRAINED
store, pinned = Store(sys.argv[1]), pin(parse_recipe(json.loads(sys.argv[2])))
store.ensure(MIXTURE, pinned)
store.ensure(TRAINED, progress(store, pinned).pinned, round=0)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends orphans on Linux only")
@pytest.mark.parametrize(("strategy", "whole_checkpoints"), [("msft", 2), ("dynamix", 6), ("ies", 7), ("sft", 2)])
def test_search_killed_in_a_rollout_measures_the_same(
    store: Store, strategy: str, whole_checkpoints: int, tmp_path: Path
):
    data = recipe(strategy=strategy)
    data["runtime"] |= {"save_steps": 1, "keep_checkpoints": 20}
    other, wait = Store(tmp_path), 120
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(tmp_path), json.dumps(data)],
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        pattern, end = ".partial/trained-*/checkpoints", time.monotonic() + wait
        while not any(numbered(folder)[whole_checkpoints - 1 :] for folder in tmp_path.glob(pattern)):
            assert launcher.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.01)
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
    (partial,) = tmp_path.glob(".partial/trained-*")
    assert any((partial / "evaluations").iterdir())
    pinned = progress(other, pin(parse_recipe(data))).searches[ONLY].pinned
    other.ensure(TRAINED, pinned, round=0)
    mine, expected = folder_of(other, pinned, 0), folder_of(store, run(store, recipe(strategy=strategy)).pinned, 0)
    assert "resume checkpoint=" in (mine / "logs" / "train.log").read_text()
    assert (mine / CURVES).read_bytes() == (expected / CURVES).read_bytes()
    for kept in (expected / "evaluations").iterdir():
        one, two = (load_file(folder / "model.safetensors") for folder in (kept, mine / "evaluations" / kept.name))
        assert all((one[name] == two[name]).all() for name in one)


ENDS_EARLY: list[dict[str, Any]] = [
    {"strategy": "ies", "ies": {"delta": 100.0}},  # after three epochs every row is left out
    {"preset": "robust", "alpha": 0.9, "evaluations_per_epoch": 4, "epochs_per_rollout": 8.0, "max_rollouts": 1},
]


@pytest.mark.long
@pytest.mark.parametrize("search", ENDS_EARLY)
def test_rollout_that_ended_early_ends_there_again_when_it_goes_on_from_its_last_checkpoint(
    store: Store, search: dict[str, Any], tmp_path: Path
):
    found = run(store, recipe(**search))
    job = read_job(RolloutJob, job_path(folder_of(store, found.pinned, 0)))
    runtime = job.train.runtime.model_copy(update={"save_steps": 1, "logging_steps": 1})
    path = write_job(
        dataclasses.replace(job, train=dataclasses.replace(job.train, out=tmp_path, runtime=runtime)), tmp_path
    )
    ends = []
    for _ in range(2):
        ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "-m", "sft_core.search.main"]
        command = [*ranks, str(path)]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        lines = [json.loads(line) for line in (tmp_path / "logs" / "log.jsonl").read_text().splitlines()]
        ends.append((lines[-1]["step"], (tmp_path / CURVES).read_bytes()))
    assert 0 < ends[0][0] < lines[0]["of"]
    assert ends[1] == ends[0]


def measured_online(store: Store, found: Searched) -> list[dict[str, Any]]:
    log = folder_of(store, found.pinned, 0) / "logs" / "online.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_dynamix_draws_each_task_by_what_a_step_on_it_gains(store: Store):
    found = run(store, recipe(strategy="dynamix"))
    (events, (measured,)) = measured_online(store, found), found.measured
    part = TRAINED.needs(found.pinned, {"round": 0})["packs"][1]
    packs = PackPlan.read(store.path(store.ensure(PACKED, found.pinned, **part)))
    tasks = [{*packs.source[first:last].tolist()} for first, last in itertools.pairwise(packs.offsets)]
    assert all(len(of_pack) == 1 for of_pack in tasks)
    assert [event["step"] for event in events] == [3, 6], "eight steps are four epochs of two steps"
    assert [drawn.epochs for drawn in measured.drawn] == [1.5, 3.0]
    for event in events:
        assert all(0 < gain < 1 for gain in event["measured"]), "one step on a pack lowers its own loss"
    best = SOURCES[int(np.argmax(events[0]["measured"]))]
    sizes = dict(zip(SOURCES, np.bincount(packs.source) / len(packs.source), strict=True))
    assert events[0]["shares"][best] > 0.7 * sizes[best] + 0.15
    gained = len(events) * len(SOURCES) * 4 / 3 / (8 * 4)  # of a pack, beside those that were trained
    held_out = store.manifest(store.ensure(SELECTION, found.pinned))["counts"]["tokens"] * 9 / 3
    trained = packs.num_tokens.sum() * 8 * 4 / len(packs)
    ratio = measured.cost.evaluation_flops / measured.cost.training_flops
    assert ratio == pytest.approx(gained + held_out / trained, rel=0.3)


@pytest.mark.long
def test_dynamix_on_two_ranks_measures_the_same(store: Store, tmp_path: Path):
    alone = measured_online(store, run(store, recipe(strategy="dynamix")))
    data = recipe(strategy="dynamix")
    data["runtime"]["num_processes"] = 2
    shared = Store(tmp_path)
    together = measured_online(shared, run(shared, data))
    for one, other in zip(alone, together, strict=True):
        assert other["step"] == one["step"]
        assert other["measured"] == pytest.approx(one["measured"], rel=1e-3)


def test_ies_trains_no_row_whose_loss_hardly_bends(store: Store):
    found = run(store, recipe(strategy="ies"))
    events, (measured,) = measured_online(store, found), found.measured
    assert len(events) >= 5
    losses = [np.array(event["measured"]) for event in events]
    part = TRAINED.needs(found.pinned, {"round": 0})["packs"][1]
    packs = PackPlan.read(store.path(store.ensure(PACKED, found.pinned, **part)))
    sizes = np.bincount(packs.source)
    trained = 3 * packs.num_tokens.sum()
    for before, middle, last in zip(losses, losses[1:], losses[2:], strict=False):
        stays = np.abs(last - 2 * middle + before) >= 0.3
        number = next(number for number, one in enumerate(losses) if one is last)
        shares = np.bincount(packs.source[stays], minlength=2) / sizes
        assert list(events[number]["shares"].values()) == pytest.approx(shares.tolist())
        trained += packs.num_tokens[stays].sum() if number < 6 else 0
    assert 0 < stays.sum() < len(stays), "some rows are left out"
    linear = measured.cost.training_flops / trained
    whole = run(store, recipe(strategy="sft")).measured[0].cost.training_flops / (2 * packs.num_tokens.sum())
    assert linear == pytest.approx(whole, rel=0.02), "FLOPs are those of the rows that were trained"


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["sft", "continual", "sro", "soft_sro"])
def test_baselines_run_to_their_end(store: Store, strategy: str):
    found = run(store, recipe(strategy=strategy))
    assert found.rounds.best is not None
    assert found.ended_by == f"{counted(len(found.rounds.rollouts), 'roll-out')} done, as planned"
    assert store.ensure(CHECKPOINT, found.pinned)


def test_search_that_works_on_each_rank_by_itself_refuses_ranks_that_share_the_weights():
    def sharded(**search: Any) -> dict[str, Any]:
        data = recipe(**search)
        data["runtime"]["distributed"] = "zero3"
        return data

    assert parse_recipe(sharded(strategy="msft")).last_phase.search is not None
    for search, name in (({"strategy": "dynamix"}, "dynamix"), ({"score": "answers"}, "search.score answers")):
        with pytest.raises(ValueError, match=rf"runtime\.distributed: found 'zero3'; {name} needs a strategy that"):
            parse_recipe(sharded(**search))


def test_search_refuses_a_key_that_its_strategy_does_not_know():
    with pytest.raises(ValueError, match=r"search: alpha: sft does not know it; remove it"):
        parse_recipe(recipe(strategy="sft", alpha=0.1))
    with pytest.raises(ValueError, match=r"search: readmit: msft, preset paper does not know it"):
        parse_recipe(recipe(readmit=True))


REFUSED: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda data: data["training"].update(num_train_epochs=2), r"training\.num_train_epochs: a search trains"),
    (lambda data: data["training"].update(max_steps=2), r"training\.max_steps: a search trains"),
    (lambda data: data["training"].update(lr_scheduler_type="cosine"), "does not know how long it will train"),
    (lambda data: data["training"].update(lora={}), r"training\.lora: a search goes back to whole checkpoints"),
    (lambda data: data["evaluation"].update(during_training={}), "a search evaluates by itself"),
    (lambda data: data["dataset_mixture"].update(selection_share=0.0), "search: no prompt is in the selection split"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_search_refuses_what_it_cannot_keep(change: Callable[[dict[str, Any]], object], message: str):
    data = recipe()
    data.setdefault("evaluation", {})
    change(data)
    with pytest.raises(ValueError, match=message):
        parse_recipe(data)
