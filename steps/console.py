"""Rich's console for text from data: no markup, no emoji codes, and a symbol for each character that acts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from sft_core.report.shown import shown


class TextConsole(Console):
    """Colours are those of styles alone: a string is text, and what acts in any text is shown."""

    def __init__(self, **options: Any):
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(shown(text), **options)

    def render(self, *arguments: Any, **options: Any) -> Iterable[Segment]:
        for segment in super().render(*arguments, **options):
            yield segment if segment.control else segment._replace(text=shown(segment.text))


def styled(*parts: str | tuple[str, str]) -> Text:
    """Text of parts, some of them with a style. Rich's Text drops characters that act; here they are symbols."""
    return Text.assemble(*(shown(part) if isinstance(part, str) else (shown(part[0]), part[1]) for part in parts))
