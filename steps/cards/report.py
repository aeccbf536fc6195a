"""The card of report: scores from model to model, what each phase changes, and what thinking gains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sft_core.evaluate.counts import ReportCounts
from sft_core.report.plots import first_to_last
from sft_core.report.rows import OverviewRow, PhaseChange, ScoreRow, ThinkingGain
from sft_core.report.tables import LOSSES, overview_rows
from sft_core.store.ref import Ref
from sft_core.store.store import Store
from steps.cards.pieces import chart, heading, table, warnings
from steps.report import flagged


def card(store: Store, ref: Ref) -> list[Any]:
    manifest = store.manifest(ref)
    counts = ReportCounts.from_json(manifest["counts"])
    scores, gains = counts.scores, counts.thinking
    models = scores[0].models if scores else []
    components = [heading(f"Scores of {manifest['identity']['section']['recipe']}"), *warnings(flagged(scores))]
    components.append(table(FIRST, [_first_row(row) for row in overview_rows(scores)]))
    if counts.phases:
        components += [heading("What each phase changes"), table(PHASES, [_phase_row(row) for row in counts.phases])]
    if gains:
        components += [heading("What thinking gains"), table(GAINS, [_gain_row(row) for row in gains])]
    metrics = dict.fromkeys(row.metric for row in scores)
    # No chart of perplexities: they are the losses on another scale, and can differ a thousandfold between tasks.
    drawn = [*(name for name in metrics if name not in LOSSES), *(name for name in ("loss", "token_accuracy"))]
    components += [
        heading("From model to model"),
        *(chart(first_to_last(scores, name)) for name in drawn if name in metrics),
    ]
    return [
        *components,
        heading("Every score"),
        table((*SCORES[:3], " → ".join(models), SCORES[3]), [_score_row(row) for row in scores]),
    ]


# A card is narrow: fewer columns than the table in the terminal, with the same numbers.
FIRST = ("task", "n", "loss", "score of answers", "difference, 95 % interval")


SCORES = ("task", "metric", "n", "difference, 95 % interval")


PHASES = ("task", "metric", "phase", "difference to the model before it, 95 % interval")


GAINS = ("task", "n", "no_think → think", "gain, 95 % interval", "generated tokens", "share cut off")


def _first_row(row: OverviewRow) -> tuple[object, ...]:
    score = f"{row.metric} {_arrow(row.scores.values())}" if row.metric else "-"
    return row.task, row.n, _arrow(row.losses.values()), score, _interval(row.difference, row.low, row.high)


def _score_row(row: ScoreRow) -> tuple[object, ...]:
    return row.task, row.metric, row.n, _arrow(row.by_model.values()), _interval(row.difference, row.low, row.high)


def _phase_row(row: PhaseChange) -> tuple[object, ...]:
    return row["task"], row["metric"], row["phase"], _interval(row["value"], row["low"], row["high"])


def _gain_row(row: ThinkingGain) -> tuple[object, ...]:
    return (
        row["task"],
        row["n"],
        _arrow([row["no_think"], row["think"]]),
        _interval(row["gain"], row["low"], row["high"]),
        _arrow([row["tokens no_think"], row["tokens think"]]),
        _arrow([row["cut off no_think"], row["cut off think"]]),
    )


def _arrow(values: Iterable[float | None]) -> str:
    """The values in a line; "-" where one is missing."""
    texts = [None if value is None else _number(value) for value in values]
    return "-" if None in texts else " → ".join(filter(None, texts))


def _interval(difference: float | None, low: float | None, high: float | None) -> str:
    if difference is None:
        return ""
    text = _number(difference, sign="+")
    return text if low is None or high is None else f"{text} ({_number(low)} to {_number(high)})"


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4g}"
