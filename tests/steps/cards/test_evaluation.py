"""The evaluation card and the printed table: differences, red flags in words, rows won and lost, data as text."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sft_core.pins.pinned import pin
from sft_core.recipe.parse import parse_recipe
from sft_core.store.ref import Ref
from sft_core.store.store import Store
from steps import evaluate, report
from steps.cards import task
from tests.report.columns import HEADER
from tests.steps.cards.outputs import saved_evaluation
from tests.train.tiny import tiny_recipe

SCRIPT = "<script>alert(1)</script>"


def rendered(components: list[Any]) -> str:
    text = json.dumps([component.render() for component in components], ensure_ascii=False)
    return re.sub(r"(markdown|table)_[0-9a-f]+", "", text)  # a random name that each has


def save(store: Store, model: str, values: list[float], outputs: list[str], cut_off: int = 0) -> Ref:
    """An evaluation in the store, of rows that have these scores."""
    asked = [f"ask {SCRIPT} {'at length ' * 40}{row}?" for row in range(len(values))]
    wanted = [f"want {SCRIPT}"] * len(values)
    return saved_evaluation(store, model, values, outputs, task="copy", asked=asked, wanted=wanted, cut_off=cut_off)


@pytest.fixture
def refs(tmp_path: Path) -> tuple[Store, dict[str, Ref]]:
    store = Store(tmp_path / "store")
    long = "long " * 1000
    base = save(store, "base", [1.0] * 20 + [0.0] * 3 + [1.0] * 2, [f"base {row}" for row in range(25)])
    outputs = [f"tuned {SCRIPT}", long, *(f"tuned {row}" for row in range(2, 25))]
    outputs[24] = "<think>\nno end"
    tuned = save(store, "tuned", [0.0] * 20 + [1.0] * 3 + [1.0] * 2, outputs, cut_off=2)
    return store, {"base": base, "tuned": tuned}


def test_evaluation_card_tells_differences_flags_and_changed_rows(refs: tuple[Store, dict[str, Ref]]) -> None:
    components = task.card(*refs)
    shown = rendered(components)
    assert re.search(r"0\.8800 ± 0\.0663 → 0\.2000 ± 0\.0816 \(n 25\); -0\.6800, 95 % -0\.\d+ to -0\.\d+", shown)
    for flag in ("exact_match: worse than base", "1 of 25 answers empty", "8% cut off"):
        assert flag in shown
    assert shown.count("Red flag:") == 1
    assert "Won: 3 rows" in shown and "Lost: 20 rows" in shown
    tables = [component.render() for component in components if component.render().get("type") == "table"]
    assert [len(table["data"]) for table in tables[1:]] == [3, 8, 2]
    assert "The same: 2 rows" in shown
    for table, first in zip(tables[1:], ("20", "0", "23"), strict=True):
        asked = table["data"][0][0]
        assert asked.startswith("… ") and asked.endswith(f" {first}?") and len(asked) == 202


def test_evaluation_card_shows_data_as_text_and_cut(refs: tuple[Store, dict[str, Ref]]) -> None:
    from metaflow.plugins.cards.card_modules.basic import TableComponent

    components = task.card(*refs)
    tables = [one.render() for one in components if one.render().get("type") == TableComponent.type]
    cells = [str(cell) for table in tables for row in table["data"] for cell in row]
    scripts = [cell for cell in cells if "script" in cell]
    assert len(scripts) > 8
    assert max(map(len, cells)) < 400 and any(cell.endswith("…") for cell in cells)
    # What is no table is Markdown, in which a browser reads tags.
    assert "script" not in rendered([one for one in components if one.render().get("type") != TableComponent.type])


def test_evaluation_card_of_a_cache_hit_is_the_same(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    pinned = pin(parse_recipe(tiny_recipe(evaluation={"max_rows": 8, "max_new_tokens": 4})))
    part = {"model": "base", "task": "copy_no_think"}
    ref = store.ensure(evaluate.EVALUATED, pinned, **part)
    first = rendered(task.card(store, {"base": ref, "tuned": ref}))
    assert store.ensure(evaluate.EVALUATED, pinned, **part) == ref
    assert rendered(task.card(Store(tmp_path / "store"), {"base": ref, "tuned": ref})) == first
    assert "Won: 0 rows" in first and "tuned is exactly 0" in first


ROW = dict(zip(HEADER, ("copy", "exact_match", 9, 0.5, 0.0, 0.1, -0.5, -0.8, -0.2), strict=False))


def test_summary_flags_are_words_and_on_a_terminal_red(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{**ROW, "flags": "tuned is exactly 0; worse than base"}, {**ROW, "task": "sort", "flags": None}]
    monkeypatch.delenv("TTY_COMPATIBLE", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    plain = report.summary(rows, [], "store/model")
    assert "tuned is exactly 0; worse than base" in plain and "\x1b" not in plain
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = report.summary(rows, [], "store/model")
    (red,) = re.findall(r"\x1b\[1;31m(.*?)\x1b\[0m", coloured)
    assert red == "tuned is exactly 0; worse than base"
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain
