"""What the other tests learn of a page: all that is drawn, all that fails, and nothing is left behind."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.browser import Browser

SCORES = [{"task": "copy", "score": 0.5}, {"task": "sort", "score": 0.7}, {"task": "größer", "score": 0.9}]
BARS = {
    "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
    "title": "Scores by task",
    "width": 300,
    "data": {"values": SCORES},
    "mark": "bar",
    "encoding": {
        "x": {"field": "score", "type": "quantitative", "title": "exact match"},
        "y": {"field": "task", "type": "nominal"},
        "color": {"field": "task", "type": "nominal", "title": "the task"},
    },
}


@pytest.fixture
def heading() -> Any:
    from metaflow.cards import Markdown

    return Markdown("<h2>Scores &lt;b&gt;of&lt;/b&gt; x</h2>")


def test_card_shows_its_text_its_table_and_its_chart(browser: Browser, heading: Any) -> None:
    from metaflow.cards import Table, VegaChart

    rows = [[row["task"], str(row["score"])] for row in SCORES]
    page = browser.card([heading, Table(rows, headers=["task", "score"]), VegaChart(BARS)])
    assert page.errors == []
    assert page.headings == ["Scores <b>of</b> x"]
    assert page.tables == [[["task", "score"], ["copy", "0.5"], ["sort", "0.7"], ["größer", "0.9"]]]
    assert "größer" in page.text
    (drawn,) = page.charts
    assert (drawn.title, drawn.axes) == ("Scores by task", ["exact match", "task"])
    assert drawn.legend == ["copy", "größer", "sort", "the task"]
    assert {"copy", "sort", "größer"} <= set(drawn.labels)
    (bars,) = drawn.marks.values()
    assert sorted(bars) == [
        f"exact match: {row['score']}; task: {row['task']}; the task: {row['task']}" for row in SCORES
    ]
    assert drawn.width > 300 and drawn.height > 60
    assert drawn.values == SCORES


def test_chart_that_vega_refuses_is_an_error_and_not_drawn(browser: Browser, heading: Any) -> None:
    from metaflow.cards import VegaChart

    refused = BARS | {"encoding": {"x": {"field": "score", "type": "no such type"}}}
    page = browser.card([heading, VegaChart(refused), VegaChart(BARS)])
    assert len(page.errors) == 1 and "Invalid field type" in page.errors[0]
    assert [chart.title for chart in page.charts] == ["Scores by task"]
    assert len(page.headings) == 1


@pytest.mark.slow
def test_page_tells_exceptions_console_errors_and_what_is_missing(
    browser: Browser, tmp_path: Path, heading: Any
) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        "<h1>A page</h1><img src='missing.png'><img src='https://elsewhere.example/picture.png'>"
        "<script>console.error('wrong', 3); console.warn('careful'); setTimeout(() => { throw Error('late') }, 200)"
        "</script><div style='width:3000px;height:2000px'>wide</div>"
    )
    found = browser.open(page)
    assert len(found.errors) == 3, found.errors
    assert "wrong 3" in found.errors and found.warnings == ["careful"]
    assert any("late" in error for error in found.errors) and any("missing.png" in error for error in found.errors)
    assert "https://elsewhere.example/picture.png" in found.requests
    assert found.width > 2900 and found.height > 1900
    assert browser.open(page).errors != [] and browser.card([heading]).errors == [], "pages share nothing"


@pytest.mark.slow
def test_page_that_is_not_drawn_says_what_is_there(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.browser.TIMEOUT_S", 1.5)
    page = tmp_path / "page.html"
    page.write_text("<script>setInterval(() => { document.body.innerText = Math.random() }, 50)</script><p>x")
    with pytest.raises(AssertionError, match=r"page.html is not drawn after 1.5 s"):
        browser.open(page)


@pytest.mark.slow
def test_picture_is_as_wide_as_asked_and_as_high_as_the_page(browser: Browser, tmp_path: Path) -> None:
    page, picture = tmp_path / "page.html", tmp_path / "picture.png"
    page.write_text("<body style='margin:0'><div style='height:1500px;background:#9cf'>")
    browser.picture(page, picture, width=700)
    assert _size(picture) == (700, 1500)
    browser.picture(page, picture, width=700, height=400)
    assert _size(picture) == (700, 400)
    script = "document.querySelector('div').style.height = '1200px'"
    assert browser.picture(page, picture, script=script).height == _size(picture)[1] == 1200


@pytest.mark.slow
def test_browser_leaves_no_process_and_no_folder(browser: Browser, heading: Any) -> None:
    before = set(Path(tempfile.gettempdir()).glob("browser-*"))
    with Browser() as another:
        group, (profile,) = another.process_id, set(Path(tempfile.gettempdir()).glob("browser-*")) - before
        assert len(another.card([heading]).headings) == 1
        assert len(_processes(profile)) > 1
    assert not profile.exists() and _processes(profile) == []
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)


def _processes(profile: Path) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it ended meanwhile
        found += [line] if str(profile) in line else []
    return found


def _size(png: Path) -> tuple[int, int]:
    header = png.read_bytes()[16:24]
    return int.from_bytes(header[:4]), int.from_bytes(header[4:])
