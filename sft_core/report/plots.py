"""Vega-Lite charts as plain dicts. Sees plain numbers only."""

from __future__ import annotations

from typing import Any

_SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"
BASE_COLOUR, TUNED_COLOUR = "#9aa5b1", "#1f6feb"


def loss_curve(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Training loss by step, thick for all sources together and thin for each."""
    by_source = [
        {name.removeprefix("loss/"): value for name, value in event.items() if name.startswith("loss/")}
        for event in events
    ]
    return _curves(events, by_source, together="all")


def selection_curve(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Loss on held-out rows by step, thin for each source and thick for their mean."""
    return _curves(events, [event["losses"] for event in events], together="mean")


def _curves(events: list[dict[str, Any]], by_source: list[dict[str, float]], *, together: str) -> dict[str, Any]:
    values = [{"step": event["step"], "loss": event["loss"], "source": together} for event in events]
    values += [
        {"step": event["step"], "loss": loss, "source": source}
        for event, losses in zip(events, by_source, strict=True)
        for source, loss in losses.items()
    ]
    is_together = f"datum.source === '{together}'"
    return {
        "$schema": _SCHEMA,
        "width": 640,
        "height": 300,
        "data": {"values": values},
        "mark": {"type": "line", "clip": True},
        "encoding": {
            "x": {"field": "step", "type": "quantitative", "title": "optimizer step"},
            "y": {"field": "loss", "type": "quantitative", "title": "loss per trained token"},
            "color": {"field": "source", "type": "nominal", "title": "source"},
            "size": {"condition": {"test": is_together, "value": 3}, "value": 1},
            "opacity": {"condition": {"test": is_together, "value": 1}, "value": 0.6},
        },
    }


def rollouts(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Selection scores by epoch of each roll-out, side by side: a line a task, dashed where it is not trained, a dot
    where it peaked. points: {rollout, epoch, task, score, is_active, is_peak}."""
    line = {
        "x": {"field": "epoch", "type": "quantitative", "title": "epochs of the roll-out"},
        "y": {"field": "score", "type": "quantitative", "title": "selection score", "scale": {"zero": False}},
        "color": {"field": "task", "type": "nominal", "title": "task"},
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


def base_to_tuned(rows: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """A line a task from the base score to the tuned one. rows: as the score table has them."""
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
                        "field": "base",
                        "type": "quantitative",
                        "title": f"{metric.replace('_', ' ')}: base (grey) to tuned (blue)",
                    },
                    "x2": {"field": "tuned"},
                },
            },
            dots("base", BASE_COLOUR),
            dots("tuned", TUNED_COLOUR),
        ],
    }


def bars(values: dict[str, float], *, x_title: str) -> dict[str, Any]:
    """One horizontal bar a name."""
    return {
        "$schema": _SCHEMA,
        "width": 520,
        "height": {"step": 20},
        "data": {"values": [{"name": name, "value": value} for name, value in values.items()]},
        "mark": {"type": "bar", "tooltip": True, "color": TUNED_COLOUR},
        "encoding": {
            "y": {"field": "name", "type": "nominal", "title": None, "sort": None, "axis": {"labelLimit": 300}},
            "x": {"field": "value", "type": "quantitative", "title": x_title},
        },
    }


def requested_and_achieved(rows: list[dict[str, Any]], *, x_title: str) -> dict[str, Any]:
    """Two horizontal bars a name: what was asked for in grey, what came in blue. rows: {name, requested, achieved}."""
    kinds = ("requested", "achieved")
    values = [{"name": row["name"], "kind": kind, "share": row[kind]} for row in rows for kind in kinds]
    return {
        "$schema": _SCHEMA,
        "width": 520,
        "height": {"step": 12},
        "data": {"values": values},
        "mark": {"type": "bar", "tooltip": True},
        "encoding": {
            "y": {"field": "name", "type": "nominal", "title": None, "sort": None, "axis": {"labelLimit": 300}},
            "yOffset": {"field": "kind", "type": "nominal", "sort": list(kinds)},
            "x": {"field": "share", "type": "quantitative", "title": x_title, "axis": {"format": ".0%"}},
            "color": {
                "field": "kind",
                "type": "nominal",
                "title": None,
                "scale": {"domain": list(kinds), "range": [BASE_COLOUR, TUNED_COLOUR]},
            },
        },
    }
