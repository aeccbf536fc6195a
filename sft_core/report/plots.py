"""Vega-Lite charts as plain data. Sees plain numbers only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

from sft_core.report.rows import ScoreRow

_SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
BASE_COLOUR, BETWEEN_COLOUR, TUNED_COLOUR = "#9aa5b1", "#9ecbff", "#1f6feb"
_COUNTS = {"tickCount": 4, "tickMinStep": 1, "format": ",d"}
_LOSS = "loss per trained token"
_STEP = {"field": "step", "type": "quantitative", "title": "optimizer step", "axis": {"tickMinStep": 1}}
E = TypeVar("E")


def loss_curve(events: Sequence[Mapping[str, float]]) -> Mapping[str, object]:
    """The loss of all sources together, by step. events: {step, loss}, at least one."""
    shown = thinned(events, 1000)
    return {
        "$schema": _SCHEMA,
        "width": 640,
        "height": 240,
        "data": {"values": [{"step": event["step"], "loss": _finite(event["loss"])} for event in shown]},
        "mark": {"type": "line", "color": TUNED_COLOUR, "point": _points(shown), "tooltip": True},
        "encoding": {
            "x": _STEP,
            "y": {"field": "loss", "type": "quantitative", "title": _LOSS, "scale": {"zero": False}},
        },
    }


def loss_by_source(
    events: Sequence[Mapping[str, float]], losses: Sequence[Mapping[str, float]]
) -> Mapping[str, object]:
    """A small chart for each source: its loss in blue, the loss of all sources in grey; 25 lines in one chart tangle.

    losses: by source, for each event. All charts share one scale.
    """
    sources = list(dict.fromkeys(source for by_source in losses for source in by_source))
    shown = thinned(list(zip(events, losses, strict=True)), 100)
    kinds = ("all sources", "this source")
    values = [
        {"step": event["step"], "source": source, "kind": kind, "loss": _finite(loss)}
        for event, by_source in shown
        for source in sources
        for kind, loss in zip(kinds, (event["loss"], by_source.get(source)), strict=True)
        if loss is not None
    ]
    return {
        "$schema": _SCHEMA,
        "width": 200,
        "height": 80,
        "data": {"values": values},
        "mark": {"type": "line", "point": _points(shown), "tooltip": True},
        "encoding": {
            "facet": {
                "field": "source",
                "type": "nominal",
                "title": None,
                "sort": sources,
                "columns": 3,
                "spacing": {"row": 12, "column": 24},
                "header": {"labelExpr": _cut("datum.label", 34), "labelLimit": 220, "labelFontSize": 10},
            },
            "x": {**_STEP, "axis": {"tickCount": 4, "labelOverlap": True}},
            "y": {
                "field": "loss",
                "type": "quantitative",
                "title": "loss",
                "scale": {"zero": False},
                "axis": {"tickCount": 4},
            },
            "color": _two_colours(kinds),
        },
    }


def by_step(events: Sequence[Mapping[str, float]], measures: dict[str, str]) -> Mapping[str, object]:
    """Other measures by step, each in a chart with its own scale. measures: {title with unit: key of the events}."""
    shown = thinned(events, 500)
    values = [
        {"step": event["step"], "measure": title, "value": _finite(event[key])}
        for event in shown
        for title, key in measures.items()
        if key in event
    ]
    return {
        "$schema": _SCHEMA,
        "width": 300,
        "height": 110,
        "data": {"values": values},
        "mark": {"type": "line", "color": TUNED_COLOUR, "point": _points(shown), "tooltip": True},
        "encoding": {
            "facet": {
                "field": "measure",
                "type": "nominal",
                "title": None,
                "sort": list(measures),
                "columns": 2,
                "header": {"labelFontSize": 12},
            },
            "x": {**_STEP, "axis": {"tickCount": 4, "labelOverlap": True}},
            "y": {
                "field": "value",
                "type": "quantitative",
                "title": None,
                "axis": {"tickCount": 4},
            },
        },
        "resolve": {"scale": {"y": "independent"}, "axis": {"y": "independent"}},
    }


def thinned(events: Sequence[E], most: int) -> Sequence[E]:
    """At most `most` events, evenly spaced, with the first and the last: a card is redrawn while the log grows."""
    if len(events) <= most:
        return events
    return [events[round(place * (len(events) - 1) / (most - 1))] for place in range(most)]


def _points(shown: Sequence[object]) -> bool | Mapping[str, int]:
    """Dots on a line of few points: a line through a single point is invisible."""
    return {"size": 18} if len(shown) <= 30 else False


def _finite(value: float) -> float | None:
    """None for NaN and infinity, which JSON has no numbers for: a card with one stays empty."""
    return value if math.isfinite(value) else None


def _cut(label: str, most: int) -> str:
    """A Vega expression that leaves out a long label's middle: names of sources differ at both ends."""
    half = most // 2
    return f"length({label}) > {most} ? slice({label}, 0, {half}) + '…' + slice({label}, -{half}) : {label}"


def _two_colours(kinds: tuple[str, str]) -> Mapping[str, object]:
    return {
        "field": "kind",
        "type": "nominal",
        "title": None,
        "scale": {"domain": list(kinds), "range": [BASE_COLOUR, TUNED_COLOUR]},
        "legend": {"orient": "top"},
    }


def histogram(bins: list[tuple[int, int, int]], *, x_title: str, y_title: str) -> Mapping[str, object]:
    """A bar for each bin (from, to, count), at least one, without gaps; `to` belongs to the next bin."""
    values = [
        {"bin": f"{start:,}" if end == start + 1 else f"{start:,}–{end - 1:,}", "count": count}
        for start, end, count in bins
    ]
    return {
        "$schema": _SCHEMA,
        "width": {"step": 28 if len(bins) <= 20 else 16},
        "height": 150,
        "data": {"values": values},
        "mark": {"type": "bar", "color": TUNED_COLOUR, "tooltip": True},
        "encoding": {
            "x": {"field": "bin", "type": "ordinal", "title": x_title, "sort": None, "axis": {"labelAngle": -45}},
            "y": {
                "field": "count",
                "type": "quantitative",
                "title": y_title,
                "axis": _COUNTS,
            },
        },
    }


def fills(percents: dict[int, int], *, x_title: str, y_title: str) -> Mapping[str, object]:
    """The number of packs by whole percent of their fill; 100 is full. percents: {percent: count}."""
    values = [{"percent": percent, "to": percent + 1, "count": count} for percent, count in percents.items()]
    return {
        "$schema": _SCHEMA,
        "width": 520,
        "height": 150,
        "data": {"values": values},
        "mark": {"type": "bar", "color": TUNED_COLOUR, "tooltip": True},
        "encoding": {
            "x": {
                "field": "percent",
                "bin": "binned",
                "type": "quantitative",
                "title": x_title,
                "scale": {"domain": [0, 101], "nice": False},
                "axis": {"values": list(range(0, 101, 10)), "format": "d"},
            },
            "x2": {"field": "to"},
            "y": {
                "field": "count",
                "type": "quantitative",
                "title": y_title,
                "axis": _COUNTS,
            },
        },
    }


def lengths_by_source(histograms: dict[str, dict[str, list[tuple[int, int, int]]]]) -> Mapping[str, object]:
    """The lengths of each source's rows, darker where more rows are: a line for each source, a column for each kind.

    histograms: {kind of length: {source: bins}}, bins as in `histogram`.
    """
    values = [
        {
            "kind": kind,
            "source": source,
            "from": start,
            "to": end,
            "share": count / sum(bin_count for _, _, bin_count in bins),
        }
        for kind, by_source in histograms.items()
        for source, bins in by_source.items()
        for start, end, count in bins
        if count
    ]
    sources = list(dict.fromkeys(source for by_source in histograms.values() for source in by_source))
    return {
        "$schema": _SCHEMA,
        "width": 240,
        "height": {"step": 16},
        "data": {"values": values},
        "mark": {"type": "rect", "tooltip": True},
        "encoding": {
            "column": {"field": "kind", "type": "nominal", "title": None, "sort": list(histograms)},
            "x": {
                "field": "from",
                "bin": "binned",
                "type": "quantitative",
                "title": "length, tokens (log scale)",
                "scale": {"type": "log", "base": 2, "nice": False},
                "axis": {"tickCount": 6, "labelOverlap": True, "format": ",", "grid": True},
            },
            "x2": {"field": "to"},
            "y": _names("source", sources),
            "color": {
                "field": "share",
                "type": "quantitative",
                "title": "share of the source's rows",
                "scale": {"scheme": "blues", "domainMin": 0},
                "legend": {"format": ".0%", "orient": "top", "gradientLength": 200},
            },
        },
    }


def _names(field: str, names: Sequence[object]) -> Mapping[str, object]:
    axis = {"labelExpr": _cut("datum.label", 42), "labelLimit": 300}
    return {"field": field, "type": "nominal", "title": None, "sort": names, "axis": axis}


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """A task's selection score at one evaluation of a roll-out."""

    rollout: str
    epoch: float
    task: str
    score: float
    is_active: bool  # the roll-out trains the task
    is_peak: bool


def rollouts(points: Sequence[CurvePoint]) -> Mapping[str, object]:
    """Selection scores by epoch, a chart for each roll-out: a line for each task, dashed while the roll-out does not
    train it, with a dot at its peak."""
    line = {
        "x": {"field": "epoch", "type": "quantitative", "title": "epochs of the roll-out"},
        "y": {"field": "score", "type": "quantitative", "title": "selection score", "scale": {"zero": False}},
        "color": {
            "field": "task",
            "type": "nominal",
            "title": None,
            "legend": {"orient": "top", "columns": 4, "labelLimit": 150},  # beside the charts it would leave the page
        },
    }
    dash = {"condition": {"test": "datum.is_active", "value": [1, 0]}, "value": [4, 4]}
    peaks = {"mark": {"type": "point", "filled": True, "size": 70}, "transform": [{"filter": "datum.is_peak"}]}
    return {
        "$schema": _SCHEMA,
        "data": {"values": [dataclasses.asdict(point) for point in points]},
        "facet": {"field": "rollout", "type": "nominal", "title": None, "sort": None},
        "columns": 2,
        "spec": {
            "width": 280,
            "height": 200,
            "layer": [{"mark": "line", "encoding": {**line, "strokeDash": dash}}, {**peaks, "encoding": line}],
        },
    }


def first_to_last(rows: Sequence[ScoreRow], metric: str) -> Mapping[str, object]:
    """A line for each task from the first model's score to the last one's, with a dot for each model.

    rows: at least one.
    """
    models = rows[0].models
    first, last = models[0], models[-1]
    between = f", {', '.join(models[1:-1])} (light blue)" if models[1:-1] else ""
    values = [row.to_json() for row in rows if row.metric == metric]
    task = {"field": "task", "type": "nominal", "title": None, "sort": None, "axis": {"labelLimit": 300}}

    def dots(model: str, colour: str) -> Mapping[str, object]:
        # A tooltip whose entry is called `image` is a picture, which the browser loads: it may not be a model's name.
        shown = [{"field": "task"}, {"field": model, "type": "quantitative", "title": f"score of {model}"}]
        return {
            "mark": {"type": "point", "filled": True, "size": 90, "color": colour},
            "encoding": {"y": task, "x": {"field": model, "type": "quantitative"}, "tooltip": shown},
        }

    return {
        "$schema": _SCHEMA,
        "width": 520,
        "height": {"step": 22},
        "data": {"values": values},
        "layer": [
            {
                "mark": {"type": "rule", "strokeWidth": 2, "color": BASE_COLOUR},
                "encoding": {
                    "y": task,
                    "x": {
                        "field": first,
                        "type": "quantitative",
                        "title": f"{metric.replace('_', ' ')}: {first} (grey){between} to {last} (blue)",
                    },
                    "x2": {"field": last},
                },
            },
            dots(first, BASE_COLOUR),
            *(dots(model, BETWEEN_COLOUR) for model in models[1:-1]),
            dots(last, TUNED_COLOUR),
        ],
    }


def requested_and_achieved(rows: Sequence[Mapping[str, str | float]]) -> Mapping[str, object]:
    """Two horizontal bars for each name, the requested share in grey and the achieved one in blue; a column for each
    amount.

    rows: {name, amount, requested, achieved}; the shares are of the amount's sum.
    """
    kinds = ("requested", "achieved")
    values = [
        {"name": row["name"], "amount": row["amount"], "kind": kind, "share": row[kind]}
        for row in rows
        for kind in kinds
    ]
    names, amounts = (list(dict.fromkeys(row[key] for row in rows)) for key in ("name", "amount"))
    return {
        "$schema": _SCHEMA,
        "width": 170,
        "height": {"step": 9},
        "data": {"values": values},
        "mark": {"type": "bar", "tooltip": True},
        "encoding": {
            "column": {"field": "amount", "type": "nominal", "title": None, "sort": amounts},
            "y": _names("name", names),
            "yOffset": {"field": "kind", "type": "nominal", "sort": list(kinds)},
            "x": {
                "field": "share",
                "type": "quantitative",
                "title": "share of the mixture",
                "axis": {"format": ".0%", "tickCount": 4},
            },
            "color": _two_colours(kinds),
        },
    }
