"""The cards of scores, in a browser, beside the manifests that they are drawn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft_core.pins.pinned import PinnedRecipe, pin
from sft_core.recipe.parse import parse_recipe
from sft_core.store.store import Store
from steps import evaluate, report
from steps.cards import report as report_card
from steps.cards import task as task_card
from tests.browser import Browser
from tests.train.tiny import SOURCES, tiny_recipe

pytestmark = pytest.mark.slow

MODELS = ("base", "tuned")


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, PinnedRecipe]:
    # Twins over the same prompts, so that there is a gain of thinking to show.
    data = tiny_recipe(training={"num_train_epochs": 1}, evaluation={"max_rows": 8, "max_new_tokens": 8})
    folder = Path(data["dataset_mixture"]["datasets"][1]["path"]).parent
    data["dataset_mixture"]["datasets"][0] = {"path": str(folder / "checksum_no_think.jsonl")}
    store, pinned = Store(tmp_path_factory.mktemp("store")), pin(parse_recipe(data))
    store.ensure(report.REPORT, pinned)
    return store, pinned


def number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4g}"


def with_interval(score: dict[str, Any]) -> str:
    return f"{number(score['difference'], '+')} ({number(score['low'])} to {number(score['high'])})"


def test_report_card_shows_the_scores_of_its_manifest(scored: tuple[Store, PinnedRecipe], browser: Browser) -> None:
    store, pinned = scored
    ref = store.ensure(report.REPORT, pinned)
    counts = store.manifest(ref)["counts"]
    page = browser.card(report_card.card(store, ref))
    assert page.errors == []
    first, gains, scores = page.tables
    assert [row[:3] for row in scores[1:]] == [[s["task"], s["metric"], str(s["n"])] for s in counts["scores"]]
    for row, score in zip(scores[1:], counts["scores"], strict=True):
        assert row[3] == f"{number(score['base'])} → {number(score['tuned'])}"
        assert row[4].replace("\n", " ") == with_interval(score)
    by_name = {(score["task"], score["metric"]): score for score in counts["scores"]}
    assert [row[0] for row in first[1:]] == list(dict.fromkeys(task for task, _ in by_name))
    for task, _, losses, answers, difference in first[1:]:
        loss, match = by_name[task, "loss"], by_name[task, "exact_match"]
        assert losses == f"{number(loss['base'])} → {number(loss['tuned'])}"
        assert answers.replace("\n", " ") == f"exact_match {number(match['base'])} → {number(match['tuned'])}"
        assert difference.replace("\n", " ") == with_interval(match)
    (gain,) = counts["thinking"]
    assert gains[1][:3] == ["checksum", str(gain["n"]), f"{number(gain['no_think'])} → {number(gain['think'])}"]
    assert gains[1][4] == f"{number(gain['tokens no_think'])} → {number(gain['tokens think'])}"
    assert gains[1][5] == f"{number(gain['cut off no_think'])} → {number(gain['cut off think'])}"
    drawn = [{(one["task"], one["metric"]) for one in chart.values} for chart in page.charts]
    tasks = {task for task, _ in by_name}
    assert drawn == [{(task, name) for task in tasks} for name in ("exact_match", "loss", "token_accuracy")]
    flags = {flag for score in counts["scores"] for flag in (score["flags"] or "").split("; ") if flag}
    assert flags, "a model that has learnt nothing scores 0"
    for flag in flags:
        assert page.text.count(f"Red flag: {flag}:") == 1


@pytest.mark.parametrize("task", ["checksum_no_think", SOURCES[1]])
def test_evaluation_card_shows_the_scores_of_its_manifests(
    scored: tuple[Store, PinnedRecipe], browser: Browser, task: str
) -> None:
    store, pinned = scored
    refs = {model: store.ensure(evaluate.EVALUATED, pinned, model=model, task=task) for model in MODELS}
    counts = {model: store.manifest(ref)["counts"] for model, ref in refs.items()}
    page = browser.card(task_card.card(store, refs))
    assert page.errors == []
    shown: dict[str, Any] = {name.replace("\n", " "): value.replace("\n", " ") for name, value in page.tables[0]}
    assert shown["rows"] == str(counts["tuned"]["rows"])
    for base, tuned in zip(counts["base"]["scores"], counts["tuned"]["scores"], strict=True):
        told = shown[f"{tuned['metric']}: base → tuned"]
        assert told.startswith(f"{base['value']:.4f} ± {base['stderr']:.4f} → {tuned['value']:.4f}"), told
    for name in ("cut_off", "empty"):
        title = f"{name.replace('_', ' ')}: base → tuned"
        assert shown[title] == f"{counts['base'][name]} → {counts['tuned'][name]}"
    assert page.headings[0] == f"Task {task}"
