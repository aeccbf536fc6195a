"""What cards hold of data is text: in a browser it fetches nothing, leads nowhere, runs nothing, and can be read."""

from __future__ import annotations

import ast
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sft_core.pins.pinned import PinnedRecipe
from sft_core.recipe.parse import parse_recipe
from sft_core.report.plots import first_to_last
from sft_core.report.rows import ScoreRow
from sft_core.report.shown import shown
from sft_core.rounds import ONLY, Point, Rollout, Rounds
from sft_core.search.journal import Cost, Drawn
from sft_core.search.rollouts import Curves, Decision
from sft_core.store.store import Store
from steps.cards import lm_eval_task, mixture, packs, pieces, report, search, task, tokens, training
from steps.cards.offline import fetch_nothing
from steps.search import Measured, Progress, Searched
from tests.browser import Browser, Page
from tests.hostile import Listener, listener
from tests.recipe.test_phases import phased_recipe
from tests.steps.cards.outputs import saved, saved_evaluation
from tests.train.tiny import tiny_recipe

ROOT = Path(__file__).resolve().parents[3]
Text = Callable[[], str]  # the next hostile text
# What a reader does: open the tooltip of every mark. The page keeps a copy of each.
HOVER = """for (const mark of document.querySelectorAll("g[class*=' role-mark'] > *")) {
    const box = mark.getBoundingClientRect(), place = {clientX: box.x + box.width / 2, clientY: box.y + box.height / 2};
    mark.dispatchEvent(new PointerEvent("pointermove", {bubbles: true, ...place}));
    const tooltip = document.querySelector("#vg-tooltip-element.visible");
    if (tooltip) document.body.append(Object.assign(tooltip.cloneNode(true), {id: "", className: "", style: ""}));
}"""


@pytest.fixture
def listening() -> Iterator[Listener]:
    with listener() as heard:
        yield heard


def tokens_card(store: Store, text: Text, folder: Path) -> list[Any]:
    counts = {
        **{"rows": 3, "tokens": 30, "trained_tokens": 9, "duplicated_tokens": 1},
        **{"rows_by_tokens": {"8": 3}, "rows_by_trained_tokens": {"2": 3}, "proof": {"rows": 3, "turns": 3}},
        "source": {"pin": text(), "rows": 4, "rejected": {"render": {text(): 1}, text(): {text(): 2}}},
        "sample": [(text(), False), (text(), True), (text() + "\n\n" + text(), False), (text(), True)],
    }
    return tokens.card(store, saved(store, "tokens", {"source": text()}, counts))


def mixture_card(store: Store, text: Text, folder: Path) -> list[Any]:
    shares = dict.fromkeys(("rows", "tokens", "trained_tokens"), 0.5)
    source = {
        **{"rows": 9, "train": 7, "selection": 1, "report": 1, "available": 7, "weight": 0.5, "num_rows": None},
        **{"kept": 7, "tokens": 70, "trained_tokens": 30, "rows_by_tokens": {"8": 7}, "requested": shares},
        **{"rows_by_trained_tokens": {"2": 7}, "achieved": shares, "rows_read": 9},
    }
    sources = {text(): {**source, "rejected": {text(): {text(): 1}}} for _ in range(3)}
    pair = {"source": text(), "of": text(), "kind": text(), "rows": 2}
    row = {"source": text(), "row_id": text(), "of_source": text(), "of_row_id": text(), "kind": text()}
    examples = [{**row, "estimated": 1.0, "similarity": 1.0, "text": text(), "of_text": text()}]
    left = {"rows": 9, "exact": 2, "near": 0, "sources": {}, "pairs": [pair], "examples": examples}
    row = {"row_id": text(), "task": text(), "report_row_id": text(), "coverage": 0.9, "ngram": text()}
    examples = [{**row, "num_prompts": 1, "text": text(), "prompt": text()}]
    dirty = {"rows": 9, "contaminated": 1, "tasks": {text(): 1}, "examples": examples}
    inputs = {
        "duplicates": saved(store, "duplicates", {"of": text()}, left),
        f"contaminated:{text()}": saved(store, "contaminated", {"of": text()}, dirty),
    }
    counts = {"rows": 21, "tokens": 210, "trained_tokens": 90, "sources": sources}
    return mixture.card(store, saved(store, "mixture", {"of": text()}, counts, inputs=inputs))


def packs_card(store: Store, text: Text, folder: Path) -> list[Any]:
    counts = {
        **{"packs": 2, "documents": 5, "tokens": 90, "max_length": 64, "fill": 0.7, "packs_by_fill": {"70": 2}},
        **{"packs_by_documents": {"2": 2}, "documents_by_tokens": {"16": 5}},
        **{"attention_of_packs": {"least": 9, "mean": 9, "most": 9}, "dropped": {text(): 1}, "truncated": {text(): 2}},
        **{"split": {text(): 1}, "windows": {text(): 3}},
    }
    return packs.card(store, saved(store, "packed", {"of": text()}, counts))


def training_card(store: Store, text: Text, folder: Path) -> list[Any]:
    names = [text() for _ in range(3)]
    events = [
        {"step": step, "of": 3, "loss": 3.0 / step, "grad_norm": 1.0, **{f"loss/{name}": 2.0 / step for name in names}}
        for step in (1, 2, 3)
    ]
    measured = [{"step": step, "loss": 1.0, "losses": {name: 1.0 for name in names}} for step in (0, 3)]
    forward = [{"attention": text(), "documents": "together", "packs_a_forward": 1}]
    (folder / "logs").mkdir()
    for name, lines in (("log", events), ("selection", measured), ("forward", forward)):
        (folder / "logs" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return training.card(folder)


def search_card(store: Store, text: Text, folder: Path) -> list[Any]:
    data = tiny_recipe(dataset_mixture={"selection_share": 0.2}, search={"strategy": "msft"})
    del data["training"]["num_train_epochs"]
    data["training"]["lr_scheduler_type"] = "constant"
    names = tuple(text() for _ in range(3))
    curves = Curves([0.0, 1.0], {name: np.ones((2, 4)) for name in names})
    shared, own = text(), text()
    evidence = {name: {shared: 1.0, own: float(number), "peak": 1} for number, name in enumerate(names)}
    decision = Decision(0, names[:1], names[1:2], Point(0, 1), 1.0, text(), evidence)
    drawn = [Drawn(0.5, dict.fromkeys(names, 0.3))]
    measured = [Measured(curves, decision, Cost(1e15, 1e14, 1, 2**30), drawn)]
    rounds = Rounds((Rollout(0, None, names, 2.0),), best=Point(0, 1))
    pinned = PinnedRecipe(parse_recipe(data), {})
    searched = Searched(pinned, rounds, is_over=True, measured=measured, ended_by=text())
    return search.card(Progress(pinned, {ONLY: searched}), ONLY)


def task_card(store: Store, text: Text, folder: Path) -> list[Any]:
    name, models = text(), ("base", "tuned")
    values = {"base": [0.0, 1.0, 1.0, 0.0], "tuned": [1.0, 0.0, 1.0, 0.0]}
    texts = {"task": name, "asked": [text() for _ in range(4)], "wanted": [text() for _ in range(4)], "engine": text()}
    return task.card(
        store,
        {model: saved_evaluation(store, model, values[model], [text() for _ in range(4)], **texts) for model in models},
    )


def lm_eval_card(store: Store, text: Text, folder: Path) -> list[Any]:
    name, metric, refs = text(), text(), {}
    for model, value in (("base", 1.0), ("tuned", 0.0)):
        scores = [{"metric": metric, "value": value, "stderr": 0.1, "n": 3}]
        counts = {"rows": 3, "prompts": 3, "cut": 1, "num_fewshot": text(), "scores": scores}
        refs[model] = saved(store, "harness", {"task": name, "model": model}, counts)
        samples = [
            {
                **{"task": name, "doc_id": number, "doc_hash": text(), "prompt_hash": text(), "filter": "none"},
                **{"metrics": [metric], metric: value, "target": text(), "arguments": [[text(), text()]]},
                "filtered_resps": [text()],
            }
            for number in range(3)
        ]
        (store.path(refs[model]) / "samples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in samples))
        (store.path(refs[model]) / "scores.json").write_text(json.dumps(scores))
    return lm_eval_task.card(store, refs)


def failed_card(store: Store, text: Text, folder: Path) -> list[Any]:
    phases = PinnedRecipe(parse_recipe(phased_recipe()), {})
    components = [*pieces.failure(text(), text()), *pieces.warnings([text()]), *pieces.of_phase(phases, text(), [])]
    with pytest.raises(ValueError), pieces.traceback_on(components):
        raise ValueError(text()) from KeyError(text())
    return components


def report_card(store: Store, text: Text, folder: Path) -> list[Any]:
    models = {"base": 0.1, "image": 0.2, "title": 0.3, "url": 0.4}  # names that mean something to Vega
    name = text()
    rows = [
        ScoreRow(name, metric, 9, models, 0.1, 0.3, 0.1, 0.5, flags=text()).to_json()
        for metric in (text(), "loss", "token_accuracy")
    ]
    change = {"value": 0.1, "low": 0.0, "high": 0.2}
    gain = {"n": 9, "no_think": 0.1, "think": 0.2, "gain": 0.1, "low": 0.0, "high": 0.2}
    gain |= {f"{name} {kind}": 0.1 for name in ("tokens", "cut off") for kind in ("no_think", "think")}
    counts = {
        "scores": rows,
        "thinking": [{"task": text(), **gain}],
        "phases": [{"task": text(), "metric": text(), "phase": text(), "before": text(), **change}],
    }
    return report.card(store, saved(store, "report", {"of": text()}, counts, section={"recipe": text()}))


CARDS = (
    *(tokens_card, mixture_card, packs_card, training_card, search_card, task_card, lm_eval_card, failed_card),
    report_card,
)


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
def test_card_of_hostile_data_is_text_alone(
    card: Callable[[Store, Text, Path], list[Any]], listening: Listener, browser: Browser, tmp_path: Path
) -> None:
    texts, components = listening.texts(), []
    for start in range(len(texts)):  # each field holds each of the texts once
        folder = tmp_path / str(start)
        (folder / "store").mkdir(parents=True)
        text = itertools.cycle(texts[start:] + texts[:start]).__next__
        components += card(Store(folder / "store"), text, folder)
    page = browser.card(components, script=HOVER)
    assert_text_alone(page, texts)
    assert listening.asked == [] and not [name for name in page.requests if "127.0.0.1" in name]


def assert_text_alone(page: Page, texts: list[str]) -> None:
    # A header of a table and an axis of a chart do not fold a name of 100 characters.
    assert [error for error in page.errors if "pixels wide" not in error] == []
    assert page.acting == []
    assert page.headings and "heading" not in page.headings
    read = " ".join(page.text.split())
    for text in texts:
        assert " ".join(shown(text).split()) in read


@pytest.mark.slow
def test_charts_tooltip_of_a_model_called_image_loads_no_picture(listening: Listener, browser: Browser) -> None:
    row = ScoreRow("task", "acc", 9, {"base": 0.1, "image": 0.2}, 0.1, 0.1, 0.0, 0.2)
    spec = first_to_last([row], "acc")
    page = browser.card([pieces.heading("Scores"), pieces.chart(spec)], script=HOVER)
    assert page.errors == page.acting == [] and "score of image" in page.text, "the tooltip is there"


@pytest.mark.parametrize(
    "change",
    [
        {"mark": {"type": "image", "width": 9}},
        {"mark": "image"},
        {"encoding": {"href": {"field": "a"}}},
        {"encoding": {"url": {"field": "a"}}},
        {"data": {"url": "http://127.0.0.1/rows.json"}},
        {"layer": [{"encoding": {"href": {"value": "javascript:alert(1)"}}}]},
    ],
)
def test_chart_that_would_fetch_or_lead_elsewhere_is_refused(change: dict[str, Any]) -> None:
    spec = {"data": {"values": [{"a": "x", "url": "y", "href": "z"}]}, "mark": "bar", "encoding": {}}
    pieces.chart(spec)
    with pytest.raises(AssertionError, match="a chart of"):
        pieces.chart({**spec, **change})


def test_markdown_of_a_card_takes_nothing_that_is_not_escaped() -> None:
    with pytest.raises(AssertionError, match="not escaped"):
        pieces._markdown("<b>from data</b>")  # type: ignore[arg-type]


def test_components_are_made_in_one_module_and_markdown_in_one_function() -> None:
    making, calls = [], []
    for path in [*(ROOT / "steps").rglob("*.py"), *(ROOT / "flows").rglob("*.py")]:
        text = path.read_text()
        if path.name != "pieces.py":
            making += [f"{path.name}: {line}" for line in text.splitlines() if "metaflow.cards" in line]
            continue
        for function in (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)):
            called = [ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)]
            calls += [(function.name, name) for name in called if name in ("Markdown", "Html")]
    assert making == []
    assert sorted(calls) == [("_markdown", "Markdown"), ("_tag", "Html")]


UNESCAPED = "<img src={0}/img><iframe src={0}/frame></iframe><style>@import '{0}/style'</style>\n\n![a]({0}/picture)"


@pytest.mark.slow
def test_page_of_a_card_fetches_nothing_even_where_text_is_not_escaped(
    listening: Listener, browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from metaflow.cards import Markdown
    from metaflow.plugins.cards.card_modules import basic

    task = SimpleNamespace(pathspec="Flow/1/step/1", finished=True)
    source = UNESCAPED.format(f"http://127.0.0.1:{listening.port}")

    def pages(folder: Path) -> list[Page]:
        folder.mkdir()
        markdown = Markdown(source).render()
        shown = {
            "blank": basic.BlankCard(components=[markdown]).render(task),
            "live": basic.BlankCard(components=[markdown]).render_runtime(task, {}),
            "error": basic.ErrorCard().render(task, stack_trace=source),
        }
        for name, text in shown.items():
            (folder / f"{name}.html").write_text(text)
        return [browser.open(folder / f"{name}.html", contains="") for name in shown]

    stock = pages(tmp_path / "stock")
    assert all(any("fonts.googleapis.com" in address for address in page.requests) for page in stock)
    assert {"/img", "/frame", "/picture"} <= set(listening.asked), "without the policy they are fetched"
    listening.asked.clear()

    monkeypatch.setattr(basic, "read_file", basic.read_file)  # what fetch_nothing changes is put back
    fetch_nothing()
    offline = pages(tmp_path / "offline")
    assert listening.asked == []
    for page, name in zip(offline, ("blank", "live", "error"), strict=True):
        assert not any(address.startswith("http") and "127.0.0.1" not in address for address in page.requests), name
    assert "fonts.googleapis" not in (tmp_path / "offline" / "blank.html").read_text()
    assert [page.text for page in offline] == [page.text for page in stock], "it looks the same"


def test_charts_are_drawn_on_a_page_that_fetches_nothing(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from metaflow.plugins.cards.card_modules import basic

    monkeypatch.setattr(basic, "read_file", basic.read_file)
    fetch_nothing()
    row = ScoreRow("task", "acc", 9, {"base": 0.1, "tuned": 0.2}, 0.1, 0.1, 0.0, 0.2)
    page = browser.card(
        [pieces.heading("Scores"), pieces.chart(first_to_last([row], "acc")), pieces.table(("a",), [(1,)])]
    )
    assert page.errors == [] and page.headings == ["Scores"] and page.tables == [[["a"], ["1"]]]
    (chart,) = page.charts
    assert len(chart.marks["symbol"]) == 2 and chart.axes
    assert all(not address.startswith("http") for address in page.requests)
