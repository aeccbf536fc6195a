"""A model card of hostile names in a browser: it fetches nothing, leads nowhere, and shows them as text."""

from __future__ import annotations

import html
import itertools
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from sft_core.report.model_card import Base, Card, CutOff, Score, Source, Value, model_card
from tests.browser import Browser, Page
from tests.hostile import listener


def hostile_card(texts: list[str]) -> Card:
    text = itertools.cycle(texts).__next__
    counts = {"conversations": 70, "rows": 50, "tokens": 900, "trained_tokens": 300, "share": 0.75}
    names = [text() for _ in texts]
    by_model = {"base": Value(0.1, 0.01), text(): Value(0.2, 0.01), text(): Value(0.5, 0.01)}
    change = {"task": text(), "metric": text(), "phase": text(), "before": text()}
    change |= {"value": 0.3, "low": 0.2, "high": 0.4}  # type: ignore[dict-item]
    return Card(
        name=text(),
        base=Base(text(), None, text(), text()),
        sources=[
            Source(name, text(), None, text(), text(), (text(), text()), text(), text(), **counts) for name in names
        ],
        scores=[Score(name, text(), 100, by_model, (0.4, 0.3, 0.5), is_share=True) for name in names],
        cut_offs=[CutOff(name, 50, dict.fromkeys(by_model, 3)) for name in names],
        gains=((text(), text()), [(name, text()) for name in names]),
        training={text(): {text(): text(), text(): text()} for _ in texts},
        recipe={"name": text(), text(): [text(), {text(): text()}], "evaluation": {"sampling": {text(): text()}}},
        template_kwargs={"system": text(), text(): text()},
        has_thinking_switch=True,
        lineage=[(text(), text()) for _ in texts],
        phase_changes=[change],  # type: ignore[list-item]
        not_scored=[*names],
        harness_version=text(),
    )


def as_commonmark(browser: Browser, body: str, folder: Path) -> Page:
    reader = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable(["table", "strikethrough"])
    (folder / "README.html").write_text(f"<meta charset=utf-8><main>{reader.render(body)}</main>")
    return browser.open(folder / "README.html")


def as_github_flavoured(browser: Browser, body: str, folder: Path) -> Page:
    """By the renderer in Metaflow's cards, which links addresses and lets HTML pass, as hubs do."""
    from metaflow.cards import Markdown

    return browser.card([Markdown(body)])


@pytest.mark.slow
@pytest.mark.parametrize("render", [as_commonmark, as_github_flavoured])
def test_model_card_of_hostile_names_is_text_alone(render, browser: Browser, tmp_path: Path) -> None:
    with listener() as heard:
        texts = heard.texts()
        for start in range(len(texts)):  # each field holds each of the texts once
            turned = texts[start:] + texts[:start]
            page = render(browser, model_card(hostile_card(turned)).partition("\n---\n")[2], tmp_path)
            wanted = ["Scores", "Data", "Training", "Use", "Recipe", "Lineage"]
            assert [name for name in page.headings if name in wanted] == wanted
            assert len(page.headings) == len(wanted) + 1 + len(texts), "its name, and a heading a phase"
            assert [one for one in page.acting if not one.startswith("<meta charset")] == []
            # Metaflow's renderer shows character references in text as they are.
            read = page.text if render is as_commonmark else html.unescape(page.text)
            read = "".join(read.split())
            for text in texts:
                assert "".join(c for c in text if c.isprintable() and c != " ") in read
        assert heard.asked == []
