"""The pieces of cards. A card shows data as text: Table escapes by itself, and Markdown gets escaped text."""

from __future__ import annotations

import contextlib
import html
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sft_core.data.tokens.lengths import end_of

if TYPE_CHECKING:
    from sft_core.pins.pinned import PinnedRecipe

MAX_CELL = 300  # characters
# A card is narrow and cuts off wide tables: fold long names, but never numbers.
_FOLDED = "<style>td{overflow-wrap:anywhere;min-width:4.6em;padding:8px 6px!important}</style>"


def heading(text: str) -> Any:
    """A heading, with the style that keeps the tables below it narrow; every card begins with one."""
    from metaflow.cards import Markdown

    return Markdown(f"{_FOLDED}<h2>{_escaped(text)}</h2>")


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
    from metaflow.cards import VegaChart

    return VegaChart(dict(spec))


def progress_bar(value: int, of: int, *, label: str) -> Any:
    from metaflow.cards import ProgressBar

    return ProgressBar(max=of, value=value, label=label)


def warnings(texts: list[str]) -> list[Any]:
    """Red flags in words; nothing without texts."""
    from metaflow.cards import Markdown

    return [Markdown(f"<div style='color:#cf222e'><b>Red flag:</b> {_escaped(text)}</div>") for text in texts]


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
    from metaflow.cards import Markdown

    if not pieces:
        return []
    marked = "<b style='color:#1f6feb'>{}</b>".format
    body = "".join(marked(_escaped(text)) if is_trained else _escaped(text) for text, is_trained in pieces)
    style = "white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace;font-size:13px"
    return [heading("First row (trained part in blue)"), Markdown(f"<div style='{style}'>{body}</div>")]


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
    from metaflow.cards import Markdown

    return [heading(title), Markdown(f"<pre style='white-space:pre-wrap'>{_escaped(text)}</pre>")]


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
    return text if len(text) <= MAX_CELL else text[:MAX_CELL] + " …"


def _escaped(text: str) -> str:
    # An empty line would end the HTML block, and Markdown would read on.
    return html.escape(text, quote=False).replace("\n", "&#10;")
