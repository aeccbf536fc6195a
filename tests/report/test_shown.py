"""Text from data: each character that acts is a symbol, and markup of any text shows that text."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from sft_core.report.shown import as_markup, in_json, in_one_line, show_error, shown
from sft_core.report.tables import text_table

ACTING = [*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, 0x2028, 0x2029, *range(0x202A, 0x202F)]
ACTING += [*range(0x2066, 0x206A), 0xD800, 0xDFFF]
MARKUP = (
    "\r\n\r\n<b>x</b> # y\n- item\n1. one\n\n    code\n> q\n__a__ _b_ **c** ~~d~~ `e` [f](g) ![h](i) <j:k> &lt; \\* |"
)
LINKS = "http://a.example www.b.example you@c.example ftp://d.example @you :smile: <http://e.example>"


@pytest.mark.parametrize("code", ACTING)
def test_every_character_that_acts_has_a_symbol_and_line_feed_and_tab_stay(code: int) -> None:
    text = f"a{chr(code)}b"
    if code in (0x09, 0x0A):
        assert shown(text) == text
        return
    symbol = shown(text)[1:-1]
    assert symbol == (chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else f"<U+{code:04X}>")
    assert shown(shown(text)) == shown(text)


@given(st.text())
@example(MARKUP)
def test_shown_text_has_no_other_control_character_and_keeps_all_that_shows(text: str) -> None:
    result = shown(text)
    assert not [c for c in result if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n"]
    result.encode()
    if all(c.isprintable() or c in "\t\n" for c in text):
        assert result == text
    assert "\n" not in in_one_line(text) and "\t" not in in_one_line(text)


@given(st.text())
def test_json_means_the_same_and_has_no_character_that_acts(text: str) -> None:
    written = in_json(json.dumps({"x": text}, ensure_ascii=False))
    assert json.loads(written) == {"x": text} and shown(written) == written


def rendered(markdown: str) -> str:
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
@example(MARKUP)
@example(LINKS)
@example("\n\n- item")
@example("- item")
@example("12) item")
@example("a __b__ c")
def test_markup_of_any_text_shows_the_text_in_markdown_and_in_html(text: str) -> None:
    markup = as_markup(text)
    assert "\n" not in markup and "|" not in markup and not re.search(r"<(?!/?span>)", markup)
    plain = re.sub("</?span>", "", markup)
    assert html.unescape(plain) == shown(text) or "\x00" in text
    read = " ".join(shown(text).split())
    for before, after in (("# ", ""), ("x ", ""), ("| a |\n|-|\n| ", " |"), ("<div>", "</div>"), ("- ", "")):
        page = rendered(before + markup + after)
        tags = {tag for tag in re.findall(r"<\/?(\w+)", page)} - {"span"}
        assert tags <= {"ul", "li", "h1", "p", "div", "table", "thead", "tbody", "tr", "th", "td"}, page
        assert page.count("<ul>") == before.startswith("-") and "<ol" not in page
        assert " ".join(html.unescape(re.sub("<[^>]*>", "", page)).split()).endswith(read), page


def test_no_renderer_links_an_address_of_the_text() -> None:
    markup = as_markup(LINKS)
    for part in html.unescape(re.sub("</?span>", "\0", markup)).split("\0"):
        assert not re.search(r"(https?|ftp)://|www\.|\w@\w|:smile:|@you", part), part
    assert as_markup("pass@1 -0.5 lm_eval:gsm8k f1,none 3.5") == "pass@1 -0.5 lm_eval:gsm8k f1,none 3.5"


def test_errors_text_notes_and_causes_are_shown() -> None:
    try:
        try:
            raise KeyError("first\x1b[31m")
        except KeyError as first:
            error = ValueError("row \x1b[31m\r\nis \u202ewrong", 3)
            error.add_note("of \x07")
            raise error from first
    except ValueError as caught:
        show_error(caught)
    assert error.args == ("row ␛[31m␍\nis <U+202E>wrong", 3) and error.__notes__ == ["of ␇"]
    assert error.__cause__ is not None and error.__cause__.args == ("first␛[31m",)


def test_table_of_any_cells_has_a_line_a_row() -> None:
    table = text_table(("a\n", "b"), [("x\r\n\x1b[2Jy", 1), ("\t", 2.0)])
    assert len(table.split("\n")) == 4 and "x␍␊␛[2Jy" in table and not re.search(r"[\x00-\x09\x0b-\x1f]", table)


def test_log_lines_are_shown(tmp_path: Path) -> None:
    program = "import logging; from sft_core.report.shown import log_as_text; log_as_text(logging.INFO); "
    program += r"logging.getLogger('x').info('name=%s', '\x1b[31mred\r')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stderr.decode() == "name=␛[31mred␍\n"
