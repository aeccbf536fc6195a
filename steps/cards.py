"""The pieces that cards are made of. A card shows what comes from data as text: Table does so by itself, and what
goes into Markdown is escaped."""

from __future__ import annotations

import contextlib
import html
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sft_core.data.sharding import shard_folders

MAX_CELL = 300


def heading(text: str) -> Any:
    from metaflow.cards import Markdown

    return Markdown(f"<h2>{_escaped(text)}</h2>")


def facts(title: str, values: dict[str, Any]) -> list[Any]:
    """A heading and a two-column table."""
    return [heading(title), table(("", ""), list(values.items()))]


def table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> Any:
    from metaflow.cards import Table

    return Table([[_cell(value) for value in row] for row in rows], headers=[_cell(name) for name in header])


def chart(spec: dict[str, Any]) -> Any:
    from metaflow.cards import VegaChart

    return VegaChart(spec)


def rejects(by_step: dict[str, dict[str, int]]) -> list[Any]:
    """What was put aside, by step and reason; nothing when nothing was."""
    rows = [(step, reason, count) for step, reasons in by_step.items() for reason, count in reasons.items()]
    return [heading("Rejected rows"), table(("step", "reason", "rows"), rows)] if rows else []


def sample_row(rendered: Path) -> list[Any]:
    """The first rendered row, its trained part bold and blue."""
    from metaflow.cards import Markdown

    row: dict[str, Any] = {"text": "", "spans": []}
    for shard in shard_folders(rendered):
        with pq.ParquetFile(shard / "rendered.parquet") as file:
            if found := next(file.iter_batches(batch_size=1), pa.record_batch({})).to_pylist():
                row = found[0]
                break
    text, spans, pieces, start = row["text"], row["spans"], [], 0
    for begin, end in zip(spans[::2], spans[1::2], strict=True):
        pieces += [_escaped(text[start:begin]), f"<b style='color:#1f6feb'>{_escaped(text[begin:end])}</b>"]
        start = end
    body = "".join([*pieces, _escaped(text[start:])])
    style = "white-space:pre-wrap;font-family:monospace;font-size:13px"
    return [heading("First row (trained part in blue)"), Markdown(f"<div style='{style}'>{body}</div>")]


@contextlib.contextmanager
def traceback_on(card: Any) -> Iterator[None]:
    """Puts what is raised inside on the card as well."""
    try:
        yield
    except Exception:
        from metaflow.cards import Markdown

        text = _escaped(traceback.format_exc())
        card.extend([heading("Failed"), Markdown(f"<pre style='white-space:pre-wrap'>{text}</pre>")])
        raise


def _cell(value: Any) -> str:
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
