"""The pieces of cards. A card shows data as text and fetches nothing.

No other module makes components. Markdown takes `Html` alone, in which everything that is not written here is escaped.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sft_core.data.tokens.lengths import end_of
from sft_core.report.shown import as_markup, in_one_line, shown

if TYPE_CHECKING:
    from sft_core.pins.pinned import PinnedRecipe


class Html(str):
    """Markup that this module wrote; the text in it is escaped."""


MAX_CELL = 300  # characters
# A card is narrow and cuts off wide tables: fold long names, but never numbers.
_FOLDED = Html("<style>td{overflow-wrap:anywhere;min-width:4.6em;padding:8px 6px!important}</style>")
_WRAPPED = "white-space:pre-wrap;overflow-wrap:anywhere"
_FETCHING = {"href", "url", "image", "usermeta"}  # what in a chart would lead to another place, or load it


def heading(text: str) -> Any:
    """A heading, with the style that keeps the tables below it narrow; every card begins with one."""
    return _markdown(_FOLDED, _tag("h2", text))


def of_phase(pinned: PinnedRecipe, phase: str, components: list[Any]) -> list[Any]:
    """The components, below the phase's name where the recipe has several phases."""
    return [heading(f"Phase {phase}"), *components] if len(pinned.recipe.phases) > 1 else components


def facts(title: str, values: Mapping[str, object]) -> list[Any]:
    """A heading and a two-column table."""
    return [heading(title), table(("", ""), list(values.items()))]


def table(header: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> Any:
    from metaflow.cards import Table

    return Table([[_cell(value) for value in row] for row in rows], headers=[_cell(name) for name in header])


def chart(spec: Mapping[str, object]) -> Any:
    """A Vega-Lite chart. Vega draws text as text, and fetches nothing without a channel or a mark that says so."""
    from metaflow.cards import VegaChart

    assert not (fetching := _FETCHING & {*_words(spec)}), f"a chart of {fetching}"
    return VegaChart(_drawn(spec))


def progress_bar(value: int, of: int, *, label: str) -> Any:
    from metaflow.cards import ProgressBar

    return ProgressBar(max=of, value=value, label=label)


def warnings(texts: list[str]) -> list[Any]:
    """Red flags in words; nothing without texts."""
    return [_markdown(_tag("div", _tag("b", "Red flag:"), f" {text}", style="color:#cf222e")) for text in texts]


def rejects(by_source: dict[str, dict[str, dict[str, int]]]) -> list[Any]:
    """The rejected rows of each source by step and reason; nothing when no row was rejected."""
    rows = [
        (source, step, reason, count)
        for source, steps in by_source.items()
        for step, reasons in steps.items()
        for reason, count in reasons.items()
    ]
    return [heading("Rejected rows"), table(("source", "step", "reason", "rows"), rows)] if rows else []


def sample(pieces: list[tuple[str, bool]]) -> list[Any]:
    """A row's pieces of text, trained ones bold and blue."""
    if not pieces:
        return []
    marked = [_tag("b", text, style="color:#1f6feb") if is_trained else text for text, is_trained in pieces]
    row = _tag("div", *marked, style=f"{_WRAPPED};font-family:monospace;font-size:13px")
    return [heading("First row (trained part in blue)"), _markdown(row)]


def bins(counts: dict[str, int]) -> list[tuple[int, int, int]]:
    """(from, to, count) of each bin of lengths.by_length, empty bins in between included.

    Length 0 is left out: a logarithmic scale has no place for it, and the card states it in words.
    """
    lowers = sorted(int(lower) for lower in counts if lower != "0")
    filled = []
    lower = lowers[0] if lowers else 1
    while lowers and lower <= lowers[-1]:
        filled.append((lower, end_of(lower), counts.get(str(lower), 0)))
        lower = end_of(lower)
    return filled


def failure(title: str, text: str) -> list[Any]:
    """A failure in place of a result. text: its traceback or reason."""
    return [heading(title), _markdown(_tag("pre", text, style=_WRAPPED))]


@contextlib.contextmanager
def traceback_on(card: Any) -> Iterator[None]:
    """Shows an exception of the body on the card, and raises it again."""
    try:
        yield
    except Exception:
        card.extend(failure("Failed", traceback.format_exc()))
        raise


def redraw(live: Any, components: list[Any]) -> None:
    """Replaces a card's components while its task runs. live: Metaflow's current.card."""
    live.clear()
    live.extend(components)
    live.refresh({"drawn": time.time()})


def _cell(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return "-" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4f}"
    text = str(value)
    return shown(text if len(text) <= MAX_CELL else text[:MAX_CELL] + " …")


def _markdown(*blocks: Html) -> Any:
    """One HTML block of Markdown: it ends at an empty line, and there is none."""
    from metaflow.cards import Markdown

    assert all(isinstance(block, Html) for block in blocks), "text from data is not escaped"
    return Markdown("".join(blocks))


def _tag(name: str, *content: str, style: str = "") -> Html:
    """An element. content: elements, and texts, which are escaped."""
    body = "".join(part if isinstance(part, Html) else as_markup(part) for part in content)
    opening = f"{name} style='{style}'" if style else name
    return Html(f"<{opening}>{body}</{name}>")


def _drawn(part: Any) -> Any:
    """The part of a chart's specification with its strings as they are shown: Vega refuses some that act."""
    if isinstance(part, Mapping):
        drawn = {shown(name): _drawn(value) for name, value in part.items()}
        if isinstance(title := drawn.get("title"), str):
            # Vega-Lite writes a title into an expression, and leaves backslashes and line feeds in it as they are.
            drawn["title"] = in_one_line(title).replace("\\", "\N{REVERSE SOLIDUS OPERATOR}")
        return drawn
    if isinstance(part, list | tuple):
        return [_drawn(value) for value in part]
    return shown(part) if isinstance(part, str) else part


def _words(part: object) -> Iterator[str]:
    """The names in a chart's specification, and its kinds of marks, without its rows of data."""
    if isinstance(part, Mapping):
        for name, value in part.items():
            yield name
            if name in ("mark", "type") and isinstance(value, str):
                yield value
            if name != "values":
                yield from _words(value)
    elif isinstance(part, list | tuple):
        for value in part:
            yield from _words(value)
