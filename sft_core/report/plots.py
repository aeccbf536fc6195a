"""Vega-Lite charts as plain dicts. Sees plain numbers only."""

from __future__ import annotations

import math
from typing import Any

_SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
BASE_COLOUR, BETWEEN_COLOUR, TUNED_COLOUR = "#9aa5b1", "#9ecbff", "#1f6feb"
_COUNTS = {"tickCount": 4, "tickMinStep": 1, "format": ",d"}
_LOSS = "loss per trained token"
_STEP = {"field": "step", "type": "quantitative", "title": "optimizer step", "axis": {"tickMinStep": 1}}


def loss_curve(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Loss by step, of all sources together. events: {step, loss}, at least one."""
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


def loss_by_source(events: list[dict[str, Any]], losses: list[dict[str, float]]) -> dict[str, Any]:
    """A small chart a source, its loss in blue before that of all together in grey: 25 lines in one are a tangle.

    losses: of each event by source; all sources share one scale.
    """
    sources = list(dict.fromkeys(source for one in losses for source in one))
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


def by_step(events: list[dict[str, Any]], measures: dict[str, str]) -> dict[str, Any]:
    """What else is measured at each step, a chart each with its own scale. measures: {title with unit: key}."""
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


def thinned(events: list[Any], most: int) -> list[Any]:
    """At most so many of them, evenly spaced, the first and the last included: a card is redrawn while it grows."""
    if len(events) <= most:
        return events
    return [events[round(place * (len(events) - 1) / (most - 1))] for place in range(most)]


def _points(shown: list[Any]) -> bool | dict[str, Any]:
    """Dots where there are few: a line through one point is not seen."""
    return {"size": 18} if len(shown) <= 30 else False


def _finite(value: float) -> float | None:
    """None for what JSON has no number for: a card that holds it shows nothing at all."""
    return value if math.isfinite(value) else None


def _cut(label: str, most: int) -> str:
    """A Vega expression that leaves out a long label's middle: names of sources differ at both ends."""
    half = most // 2
    return f"length({label}) > {most} ? slice({label}, 0, {half}) + '…' + slice({label}, -{half}) : {label}"


def _two_colours(kinds: tuple[str, str]) -> dict[str, Any]:
    return {
        "field": "kind",
        "type": "nominal",
        "title": None,
        "scale": {"domain": list(kinds), "range": [BASE_COLOUR, TUNED_COLOUR]},
        "legend": {"orient": "top"},
    }


def histogram(bins: list[tuple[int, int, int]], *, x_title: str, y_title: str) -> dict[str, Any]:
    """A bar each of (from, to, count), at least one, without gaps; to is in the next bin."""
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


def fills(percents: dict[int, int], *, x_title: str, y_title: str) -> dict[str, Any]:
    """How many are filled to each whole percent; 100 is all of it."""
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


def lengths_by_source(histograms: dict[str, dict[str, list[tuple[int, int, int]]]]) -> dict[str, Any]:
    """Where each source's rows lie, dark where many: a line a source, a column a kind of length.

    histograms: {kind: {source: [(from, to, count)]}}, bins as histogram has them.
    """
    values = [
        {"kind": kind, "source": source, "from": start, "to": end, "share": count / sum(one[2] for one in bins)}
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


def _names(field: str, names: list[str]) -> dict[str, Any]:
    axis = {"labelExpr": _cut("datum.label", 42), "labelLimit": 300}
    return {"field": field, "type": "nominal", "title": None, "sort": names, "axis": axis}


def rollouts(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Selection scores by epoch of each roll-out, side by side: a line a task, dashed where it is not trained, a dot
    where it peaked. points: {rollout, epoch, task, score, is_active, is_peak}."""
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
        "data": {"values": points},
        "facet": {"field": "rollout", "type": "nominal", "title": None, "sort": None},
        "columns": 2,
        "spec": {
            "width": 280,
            "height": 200,
            "layer": [{"mark": "line", "encoding": {**line, "strokeDash": dash}}, {**peaks, "encoding": line}],
        },
    }


def first_to_last(rows: list[dict[str, Any]], metric: str, models: list[str]) -> dict[str, Any]:
    """A line a task from the first model's score to the last one's, with a dot for each model.

    rows: as the score table has them. models: the start model first.
    """
    first, last = models[0], models[-1]
    between = f", {', '.join(models[1:-1])} (light blue)" if models[1:-1] else ""
    values = [row for row in rows if row["metric"] == metric]
    task = {"field": "task", "type": "nominal", "title": None, "sort": None, "axis": {"labelLimit": 300}}

    def dots(field: str, colour: str) -> dict[str, Any]:
        return {
            "mark": {"type": "point", "filled": True, "size": 90, "color": colour, "tooltip": True},
            "encoding": {"y": task, "x": {"field": field, "type": "quantitative"}},
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


def requested_and_achieved(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Two horizontal bars a name, what was asked for in grey and what came in blue; a column an amount.

    rows: {name, amount, requested, achieved}, shares of the amount's sum.
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
