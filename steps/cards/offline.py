"""Metaflow's cards as pages that fetch nothing. Their style imports a web font, and a page can be kept from more."""

from __future__ import annotations

import re

# What a browser loads for a page: what is in the page. Vega compiles expressions, and draws pictures of its own.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)
_META = f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}" />'
_IMPORT = re.compile(r"""\A\s*@import\s*(?:url\()?["'][^"']*["']\)?[^;]*;""")


def fetch_nothing() -> None:
    """Makes every card that this process renders, live ones and those of errors too, a page that fetches nothing.

    Metaflow has no setting for it. All its kinds of cards read their page and their style by one function.
    """
    from metaflow.plugins.cards.card_modules import basic

    read = basic.read_file

    def read_offline(path: str) -> str:
        return _offline(path, read(path))

    basic.read_file = read_offline


def _offline(path: str, text: str) -> str:
    if path.endswith(".css"):
        return _IMPORT.sub("", text)
    return text.replace("<head>", f"<head>\n  {_META}", 1) if path.endswith(".html") else text
