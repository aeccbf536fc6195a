"""The card of report: scores from model to model, what each phase changes, and what thinking gains."""

from __future__ import annotations

from typing import Any

from sft_core.report.plots import first_to_last
from sft_core.report.tables import LOSSES, models_of, overview_rows
from sft_core.store.ref import Ref
from sft_core.store.store import Store
from steps.cards.pieces import chart, heading, table, warnings
from steps.report import flagged


def card(store: Store, ref: Ref) -> list[Any]:
    manifest = store.manifest(ref)
    scores, gains = manifest["counts"]["scores"], manifest["counts"]["thinking"]
    models = models_of(scores[0]) if scores else []
    components = [heading(f"Scores of {manifest['identity']['section']['recipe']}"), *warnings(flagged(scores))]
    components.append(table(FIRST, [_first_row(row, models) for row in overview_rows(scores)]))
    if phases := manifest["counts"].get("phases"):
        components += [heading("What each phase changes"), table(PHASES, [_phase_row(row) for row in phases])]
    if gains:
        components += [heading("What thinking gains"), table(GAINS, [_gain_row(row) for row in gains])]
    metrics = dict.fromkeys(row["metric"] for row in scores)
    # A perplexity is a loss told otherwise, and one task's can be a thousand times another's.
    drawn = [*(name for name in metrics if name not in LOSSES), *(name for name in ("loss", "token_accuracy"))]
    components += [
        heading("From model to model"),
        *(chart(first_to_last(scores, name, models)) for name in drawn if name in metrics),
    ]
    return [
        *components,
        heading("Every score"),
        table((*SCORES[:3], " → ".join(models), SCORES[3]), [_score_row(row, models) for row in scores]),
    ]


# Of a card, which is narrow: fewer columns than the table in the terminal, with the same numbers.
FIRST = ("task", "n", "loss", "score of answers", "difference, 95 % interval")


SCORES = ("task", "metric", "n", "difference, 95 % interval")


PHASES = ("task", "metric", "phase", "difference to the model before it, 95 % interval")


GAINS = ("task", "n", "no_think → think", "gain, 95 % interval", "generated tokens", "share cut off")


def _first_row(row: dict[str, Any], models: list[str]) -> tuple[Any, ...]:
    """A row of the overview."""
    losses = [row[f"{model} loss"] for model in models]
    loss = "-" if None in losses else _arrow(losses)
    score = f"{row['metric']} {_arrow([row[model] for model in models])}" if row["metric"] else "-"
    return row["task"], row["n"], loss, score, _interval(row)


def _score_row(row: dict[str, Any], models: list[str]) -> tuple[Any, ...]:
    return row["task"], row["metric"], row["n"], _arrow([row[model] for model in models]), _interval(row)


def _phase_row(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["task"], row["metric"], row["phase"], _interval({**row, "difference": row["value"]})


def _arrow(values: list[float]) -> str:
    return " → ".join(map(_number, values))


def _gain_row(row: dict[str, Any]) -> tuple[Any, ...]:
    sides = [
        f"{_number(row[f'{name} no_think'.strip()])} → {_number(row[f'{name} think'.strip()])}"
        for name in ("", "tokens", "cut off")
    ]
    return row["task"], row["n"], sides[0], _interval({**row, "difference": row["gain"]}), *sides[1:]


def _interval(row: dict[str, Any]) -> str:
    if row["difference"] is None:
        return ""
    difference = _number(row["difference"], sign="+")
    return difference if row["low"] is None else f"{difference} ({_number(row['low'])} to {_number(row['high'])})"


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4g}"
