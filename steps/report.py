"""report: each task's scores from the start model to the last phase's checkpoint, and what thinking gains."""

from __future__ import annotations

from typing import Any

from sft_core.evaluate.summary import GAIN_HEADER, build_report
from sft_core.report.plots import first_to_last
from sft_core.report.tables import LOSSES, models_of, overview_rows, text_table
from sft_core.store.ref import Ref
from sft_core.store.stage import Stage
from sft_core.store.store import Store
from steps.cards import chart, heading, table, warnings
from steps.harness import scored_tasks, scorings
from steps.painted import last_column_red

REPORT = Stage(
    "report",
    build_report,
    section=lambda pinned, part: {
        "recipe": pinned.recipe.name,
        "tasks": scored_tasks(pinned, part),
        "models": pinned.recipe.models,
    },
    needs=scorings,
)


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


def flagged(scores: list[dict[str, Any]]) -> list[str]:
    """The red flags of a score table, one a line, with the tasks and metrics that have it."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in scores:
        for flag in (row["flags"] or "").split("; "):
            if flag:
                found.setdefault(flag, {}).setdefault(row["task"], []).append(row["metric"])
    return [
        f"{flag}: " + ", ".join(f"{task} ({', '.join(metrics)})" for task, metrics in tasks.items())
        for flag, tasks in found.items()
    ]


def failures(failed: dict[str, str]) -> str:
    """What the run ends with where tasks are not scored. failed: {task: why}."""
    told = [f"  {task}: {reason}" for task, reason in failed.items()]
    return "\n".join(
        [
            f"{len(failed)} of the tasks could not be evaluated:",
            *told,
            "The others are scored; the checkpoint is there, its card names what is missing, and it is not pushed.",
            "The tasks' logs and cards hold the tracebacks: python flows/sft_flow.py card view evaluate",
            "Once the cause is gone, `sft resume` evaluates these tasks again; so does a new run: the rest is a hit.",
        ]
    )


def summary(
    scores: list[dict[str, Any]],
    gains: list[dict[str, Any]],
    checkpoint: str,
    pushed: str | None = None,
    whole: bool = False,
) -> str:
    """What the run prints last. pushed: the checkpoint's address on the hub, if it is there. whole: every score."""
    rows = scores if whole else overview_rows(scores)
    parts = []
    if rows:
        first, *_, last = models_of(scores[0])
        header = tuple(rows[0])
        parts = [
            f"{last} - {first} is the difference, of losses where there are no answers, with its paired 95 % interval:",
            last_column_red(text_table(header, [tuple(row.values()) for row in rows]), header[-1]),
        ]
    if gains:
        parts.append("What thinking gains (mean score, paired 95 % interval; generated tokens; share cut off):")
        parts.append(text_table(GAIN_HEADER, [tuple(row.values()) for row in gains]))
    parts.append(f"checkpoint: {checkpoint}" + (f"\npushed: {pushed}" if pushed else ""))
    parts.append("perplexity and token accuracy: sft scores --all; what was answered: sft answers latest")
    parts.append("cards: python flows/sft_flow.py card view report (or train, pack, mix, evaluate, tokenize)")
    return "\n\n".join(["", *parts])
