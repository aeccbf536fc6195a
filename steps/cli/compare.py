"""Two runs side by side: what their recipes differ in, what they trained on and how, and what came of it."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from sft_core.evaluate.comparison import Difference
from sft_core.evaluate.comparison import differences as score_differences
from sft_core.report.tables import LOSSES
from sft_core.search.journal import CURVES, read_journal
from sft_core.store.ref import Ref
from sft_core.store.store import Store
from steps.plan import differences
from steps.runs.recorded import Recorded

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import RenderableType

ABSENT = "-"
ELSEWHERE = ("runtime",)  # where it runs, which shapes no result
# What is told of a run: the output, the name in its counts, how it is called.
AMOUNTS = (
    ("mixture", "rows", "rows an epoch"),
    ("mixture", "tokens", "tokens an epoch"),
    ("mixture", "trained_tokens", "trained tokens an epoch"),
    ("packed", "packs", "packs"),
    ("packed", "fill", "fill of the packs"),
    ("trained", "rollouts", "roll-outs"),
    ("trained", "steps", "steps"),
    ("trained", "first_loss", "first loss"),
    ("trained", "last_loss", "last loss"),
    ("trained", "flops", "FLOPs of training"),
    ("trained", "seconds", "seconds of training"),
)


def compared(a: Recorded, b: Recorded) -> dict[str, Any]:
    """{runs, recipe, amounts, scores}: plain data, what is not there is None."""
    stores = [Store(run.recipe.runtime.store) for run in (a, b)]
    return {
        "runs": [
            {
                "id": run.id,
                "recipe": run.recipe.name,
                "created": run.created,
                "finished": run.is_finished,
                "commit": run.commit,
            }
            for run in (a, b)
        ],
        "recipe": [{"key": key, "a": one, "b": other} for key, one, other in _recipe_differences(a, b)],
        "amounts": _amounts(stores, (a, b)),
        "scores": _scores(stores, (a, b)),
    }


def _recipe_differences(a: Recorded, b: Recorded) -> list[tuple[str, Any, Any]]:
    sides: list[dict[str, Any]] = []
    for run in (a, b):
        data = run.recipe.as_written(exclude=ELSEWHERE)
        # By name: one more source must not shift all that come after it.
        for name, phase in run.recipe.phases.items():
            mixture = (data["phases"][name] if "phases" in data else data)["dataset_mixture"]
            mixture["datasets"] = dict(zip(phase.sources, mixture["datasets"], strict=True))
        sides.append(data)
    return list(differences(sides[0], sides[1]))


def _amounts(stores: list[Store], runs: tuple[Recorded, Recorded]) -> list[dict[str, Any]]:
    sides = [_counts(store, run) for store, run in zip(stores, runs, strict=True)]
    rows = [
        {"name": told, **{s: one.get((o, n)) for s, one in zip("ab", sides, strict=True)}} for o, n, told in AMOUNTS
    ]
    return [row for row in rows if (row["a"], row["b"]) != (None, None)]


def _counts(store: Store, run: Recorded) -> dict[tuple[str, str], Any]:
    """By output and name. Of a search: its last roll-out's, but steps, seconds and FLOPs of all."""
    refs = {output: Ref(*address.split("/")) for output, address in run.outputs.items()}
    manifests = {output: store.manifest(ref) for output, ref in refs.items() if store.has(ref)}
    found = {(output, name): value for output, one in manifests.items() for name, value in one["counts"].items()}
    if (last := manifests.get("trained")) is None:
        return found
    rounds = [Ref(*address) for name, address in last["inputs"].items() if name.startswith("round:")]
    all_rounds = [*(store.manifest(ref) for ref in rounds if store.has(ref)), last]
    found["trained", "seconds"] = sum(one["seconds"] for one in all_rounds)
    if run.recipe.last_phase.search is not None and len(all_rounds) == len(rounds) + 1:
        found["trained", "rollouts"] = len(all_rounds)
        found["trained", "steps"] = sum(one["counts"]["steps"] for one in all_rounds)
        found["trained", "flops"] = sum(_flops(store, Ref(*one["ref"])) for one in all_rounds)
    return found


def _flops(store: Store, rollout: Ref) -> float:
    with store.open(rollout, CURVES) as file:
        return read_journal(file)[1].training_flops


def _scores(stores: list[Store], runs: tuple[Recorded, Recorded]) -> list[dict[str, Any]]:
    """One for each task and metric of either run; `difference` is b - a of the tuned models, by row."""
    rows = []
    for task in dict.fromkeys([*runs[0].evaluated, *runs[1].evaluated]):
        sides = [_task(store, run, task) for store, run in zip(stores, runs, strict=True)]
        tables = [_rows(store, run, task) for store, run in zip(stores, runs, strict=True)]
        metrics = list(dict.fromkeys([*sides[0], *sides[1]]))
        paired = _differences(tables, [metric for metric in metrics if metric not in LOSSES])
        for metric in metrics:
            row: dict[str, Any] = {"task": task, "metric": metric}
            row |= {name: side.get(metric) for name, side in zip("ab", sides, strict=True)}
            row["difference"] = dataclasses.asdict(paired[metric]) if metric in paired else None
            rows.append(row)
    return rows


def _differences(tables: list[pa.Table | None], asked: list[str]) -> dict[str, Difference]:
    """By metric; of answers only where both runs scored them alike. asked: the metrics of answers of either run."""
    if tables[0] is None or tables[1] is None:
        return {}
    found = score_differences(tables[0], tables[1], asked[0] if asked else "")
    if len(asked) > 1:
        found.pop(asked[0], None)
    return {metric: one for metric, one in found.items() if one.low is not None}


def _task(store: Store, run: Recorded, task: str) -> dict[str, dict[str, Any]]:
    """{metric: {n, base, tuned, stderr}}, tuned being the last phase's checkpoint."""
    found: dict[str, dict[str, Any]] = {}
    first, *_, last = run.recipe.models
    shown = {first: "base", last: "tuned"}
    for model, address in run.evaluated.get(task, {}).items():
        if model not in shown:
            continue
        ref = Ref(*address.split("/"))
        for score in store.manifest(ref)["counts"]["scores"] if store.has(ref) else ():
            one = found.setdefault(score["metric"], {"n": score["n"], "base": None, "tuned": None, "stderr": None})
            one[shown[model]] = score["value"]
            if model == last:
                one["stderr"] = score["stderr"]
    return found


def _rows(store: Store, run: Recorded, task: str) -> pa.Table | None:
    address = run.evaluated.get(task, {}).get(run.recipe.models[-1])
    if address is None or not store.has(ref := Ref(*address.split("/"))):
        return None
    if "rows.parquet" not in store.manifest(ref)["files"]:
        return None
    with store.open(ref, "rows.parquet") as file:
        return pq.read_table(file)


def as_tables(found: dict[str, Any]) -> list[RenderableType]:
    """What a terminal shows of it."""
    from rich.markup import escape

    ids = [f"{side} = {run['id']}" for side, run in zip("AB", found["runs"], strict=True)]
    parts: list[RenderableType] = []
    rows: list[tuple[str, ...]]
    names = ("recipe", "created", "finished", "commit")
    runs = [(name, *(_cell(run[name]) for run in found["runs"])) for name in names]
    parts += _titled("Runs", ("", *ids), runs)
    if found["recipe"]:
        rows = [(row["key"], _value(row["a"]), _value(row["b"])) for row in found["recipe"]]
        parts += _titled("Recipes", ("key", "A", "B"), rows)
    else:
        parts.append("The recipes are the same.\n")
    if found["amounts"]:
        rows = [(row["name"], _cell(row["a"]), _cell(row["b"])) for row in found["amounts"]]
        parts += _titled("Data and training", ("", "A", "B"), rows, first_number=1)
    if found["scores"]:
        header = ("task", "metric", "A: base → tuned", "B: base → tuned", "B - A", "95 % interval", "n")
        parts += _titled("Scores", header, [_score_row(row) for row in found["scores"]], first_number=2)
        parts.append(escape("B - A: of the tuned models, over the n rows that both scored, paired by prompt."))
    else:
        parts.append("Neither run has scores yet.")
    return parts


def _score_row(row: dict[str, Any]) -> tuple[str, ...]:
    sides = [
        ABSENT if row[side] is None else f"{_cell(row[side]['base'])} → {_cell(row[side]['tuned'])}" for side in "ab"
    ]
    if (found := row["difference"]) is None:
        return (row["task"], row["metric"], *sides, ABSENT, ABSENT, ABSENT)
    interval = f"{found['low']:+.4f} to {found['high']:+.4f}"
    return (row["task"], row["metric"], *sides, f"{found['value']:+.4f}", interval, f"{found['n']:,}")


def _titled(
    title: str, header: tuple[str, ...], rows: list[tuple[str, ...]], first_number: int | None = None
) -> list[RenderableType]:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for place, name in enumerate(header):
        is_number = first_number is not None and place >= first_number
        table.add_column(escape(name), justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return [table, ""]


def _value(value: Any) -> str:
    """As a recipe has it."""
    if value is None:
        return ABSENT
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cell(value: Any) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.4g}"
    return str(value)
