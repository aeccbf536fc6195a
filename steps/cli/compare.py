"""Two runs side by side: the differences of their recipes, their data, their training, and their scores."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any, TypedDict

from sft_core.evaluate.comparison import differences as score_differences
from sft_core.parquet import read_table
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
ELSEWHERE = ("runtime",)  # where a run takes place, which changes no result
# The amounts of a run: the output, the name in its counts, the title.
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


class Run(TypedDict):
    id: str
    recipe: str
    created: str
    finished: bool
    commit: str | None


class KeyDifference(TypedDict):
    """A key of the recipes that differs."""

    key: str
    a: Any
    b: Any


class Amount(TypedDict):
    name: str
    a: float | None
    b: float | None


class TaskScore(TypedDict):
    """tuned: the last phase's checkpoint, and stderr its standard error."""

    n: int
    base: float | None
    tuned: float | None
    stderr: float | None


class ScoreDifference(TypedDict):
    n: int
    value: float
    low: float
    high: float


class ScorePair(TypedDict):
    """difference: b - a of the tuned models, over the rows that both scored."""

    task: str
    metric: str
    a: TaskScore | None
    b: TaskScore | None
    difference: ScoreDifference | None


class Comparison(TypedDict):
    """Plain data; a missing value is None."""

    runs: list[Run]
    recipe: list[KeyDifference]
    amounts: list[Amount]
    scores: list[ScorePair]


def compared(a: Recorded, b: Recorded) -> Comparison:
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
        "recipe": [{"key": key, "a": of_a, "b": of_b} for key, of_a, of_b in _recipe_differences(a, b)],
        "amounts": _amounts(stores, (a, b)),
        "scores": _scores(stores, (a, b)),
    }


def _recipe_differences(a: Recorded, b: Recorded) -> list[tuple[str, Any, Any]]:
    sides: list[dict[str, Any]] = []
    for run in (a, b):
        data = run.recipe.as_written(exclude=ELSEWHERE)
        # Datasets by name: in a list, one source more would shift all that come after it.
        for name, phase in run.recipe.phases.items():
            mixture = (data["phases"][name] if "phases" in data else data)["dataset_mixture"]
            mixture["datasets"] = dict(zip(phase.sources, mixture["datasets"], strict=True))
        sides.append(data)
    return list(differences(sides[0], sides[1]))


def _amounts(stores: list[Store], runs: tuple[Recorded, Recorded]) -> list[Amount]:
    of_a, of_b = (_counts(store, run) for store, run in zip(stores, runs, strict=True))
    rows: list[Amount] = [
        {"name": title, "a": of_a.get((output, name)), "b": of_b.get((output, name))} for output, name, title in AMOUNTS
    ]
    return [row for row in rows if (row["a"], row["b"]) != (None, None)]


def _counts(store: Store, run: Recorded) -> dict[tuple[str, str], Any]:
    """{(output, name): count}. A search has the counts of its last roll-out, but steps, seconds and FLOPs of all."""
    refs = {output: Ref(*address.split("/")) for output, address in run.outputs.items()}
    manifests = {output: store.manifest(ref) for output, ref in refs.items() if store.has(ref)}
    counts = {
        (output, name): value for output, manifest in manifests.items() for name, value in manifest["counts"].items()
    }
    if (last := manifests.get("trained")) is None:
        return counts
    rounds = [Ref(*address) for name, address in last["inputs"].items() if name.startswith("round:")]
    all_rounds = [*(store.manifest(ref) for ref in rounds if store.has(ref)), last]
    counts["trained", "seconds"] = sum(manifest["seconds"] for manifest in all_rounds)
    if run.recipe.last_phase.search is not None and len(all_rounds) == len(rounds) + 1:
        counts["trained", "rollouts"] = len(all_rounds)
        counts["trained", "steps"] = sum(manifest["counts"]["steps"] for manifest in all_rounds)
        counts["trained", "flops"] = sum(_flops(store, Ref(*manifest["ref"])) for manifest in all_rounds)
    return counts


def _flops(store: Store, rollout: Ref) -> float:
    return read_journal(io.BytesIO(store.read(rollout, CURVES)))[1].training_flops


def _scores(stores: list[Store], runs: tuple[Recorded, Recorded]) -> list[ScorePair]:
    """One for each task and metric of either run."""
    rows: list[ScorePair] = []
    for task in dict.fromkeys([*runs[0].evaluated, *runs[1].evaluated]):
        of_a, of_b = (_task(store, run, task) for store, run in zip(stores, runs, strict=True))
        tables = [_rows(store, run, task) for store, run in zip(stores, runs, strict=True)]
        metrics = list(dict.fromkeys([*of_a, *of_b]))
        paired = _differences(tables, [metric for metric in metrics if metric not in LOSSES])
        rows += [
            {
                "task": task,
                "metric": metric,
                "a": of_a.get(metric),
                "b": of_b.get(metric),
                "difference": paired.get(metric),
            }
            for metric in metrics
        ]
    return rows


def _differences(tables: list[pa.Table | None], metrics: list[str]) -> dict[str, ScoreDifference]:
    """By metric. Answers have a difference only where both runs scored them by the same metric.

    metrics: the metrics of the answers, of either run.
    """
    if tables[0] is None or tables[1] is None:
        return {}
    by_metric = score_differences(tables[0], tables[1], metrics[0] if metrics else "")
    if len(metrics) > 1:
        by_metric.pop(metrics[0], None)
    return {
        metric: {"n": difference.n, "value": difference.value, "low": difference.low, "high": difference.high}
        for metric, difference in by_metric.items()
        if difference.low is not None and difference.high is not None
    }


def _task(store: Store, run: Recorded, task: str) -> dict[str, TaskScore]:
    """The scores of the base and the tuned model, by metric."""
    by_metric: dict[str, TaskScore] = {}
    first, *_, last = run.recipe.models
    for model, address in run.evaluated.get(task, {}).items():
        ref = Ref(*address.split("/"))
        if model not in (first, last) or not store.has(ref):
            continue
        for score in store.manifest(ref)["counts"]["scores"]:
            empty = TaskScore(n=score["n"], base=None, tuned=None, stderr=None)
            of_metric = by_metric.setdefault(score["metric"], empty)
            if model == last:
                of_metric |= {"tuned": score["value"], "stderr": score["stderr"]}
            else:
                of_metric["base"] = score["value"]
    return by_metric


def _rows(store: Store, run: Recorded, task: str) -> pa.Table | None:
    address = run.evaluated.get(task, {}).get(run.recipe.models[-1])
    if address is None or not store.has(ref := Ref(*address.split("/"))):
        return None
    if "rows.parquet" not in store.manifest(ref)["files"]:
        return None
    return read_table(io.BytesIO(store.read(ref, "rows.parquet")))


def as_tables(comparison: Comparison) -> list[RenderableType]:
    """The comparison for a terminal."""
    a, b = comparison["runs"]
    parts: list[RenderableType] = []
    rows: list[tuple[str, ...]] = [
        ("recipe", a["recipe"], b["recipe"]),
        ("created", a["created"], b["created"]),
        ("finished", _cell(a["finished"]), _cell(b["finished"])),
        ("commit", _cell(a["commit"]), _cell(b["commit"])),
    ]
    parts += _titled("Runs", ("", f"A = {a['id']}", f"B = {b['id']}"), rows)
    if comparison["recipe"]:
        rows = [(row["key"], _value(row["a"]), _value(row["b"])) for row in comparison["recipe"]]
        parts += _titled("Recipes", ("key", "A", "B"), rows)
    else:
        parts.append("The recipes are the same.\n")
    if comparison["amounts"]:
        rows = [(row["name"], _cell(row["a"]), _cell(row["b"])) for row in comparison["amounts"]]
        parts += _titled("Data and training", ("", "A", "B"), rows, first_number=1)
    if comparison["scores"]:
        header = ("task", "metric", "A: base → tuned", "B: base → tuned", "B - A", "95 % interval", "n")
        parts += _titled("Scores", header, [_score_row(row) for row in comparison["scores"]], first_number=2)
        parts.append("B - A: of the tuned models, over the n rows that both scored, paired by prompt.")
    else:
        parts.append("Neither run has scores yet.")
    return parts


def _score_row(row: ScorePair) -> tuple[str, ...]:
    sides = [
        ABSENT if side is None else f"{_cell(side['base'])} → {_cell(side['tuned'])}" for side in (row["a"], row["b"])
    ]
    if (difference := row["difference"]) is None:
        return (row["task"], row["metric"], *sides, ABSENT, ABSENT, ABSENT)
    interval = f"{difference['low']:+.4f} to {difference['high']:+.4f}"
    return (row["task"], row["metric"], *sides, f"{difference['value']:+.4f}", interval, f"{difference['n']:,}")


def _titled(
    title: str, header: tuple[str, ...], rows: list[tuple[str, ...]], first_number: int | None = None
) -> list[RenderableType]:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for place, name in enumerate(header):
        is_number = first_number is not None and place >= first_number
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return [table, ""]


def _value(value: Any) -> str:
    """The value as a recipe writes it."""
    if value is None:
        return ABSENT
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cell(value: object) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.4g}"
    return str(value)
