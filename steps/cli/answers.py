"""The answers of the start model and of the released one, row by row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from sft_core.evaluate.comparison import by_change
from sft_core.evaluate.rows import read_rows
from sft_core.recipe.evaluation import LM_EVAL
from sft_core.recipe.wording import nearest
from sft_core.store.ref import Ref
from sft_core.store.store import Store

if TYPE_CHECKING:
    from rich.text import Text

    from steps.runs.recorded import Recorded

Change = Literal["won", "lost", "same"]
STYLES: dict[Change, str] = {"won": "bold green", "lost": "bold red", "same": "bold"}


def answers(run: Recorded, task: str | None, only: Change | None) -> Iterator[dict[str, Any]]:
    """{task, row_id, change, score, asked, wanted, MODEL: outputs} of each row with answers, task by task.

    The two models are the start model and the last phase's checkpoint (base and tuned in a recipe of one phase). In a
    task the won rows come first, then the lost ones. score has each model's score, MODEL its outputs, one a sample.
    Raises ValueError for an unknown task, and for outputs that are not there.
    """
    tasks = [name for name in run.evaluated if not name.startswith(LM_EVAL)]
    if task is not None and task not in tasks:
        hint = "; those of lm-eval are in the samples.jsonl of its output" if task.startswith(LM_EVAL) else ""
        raise ValueError(f"--task: found {task!r}; it is no task whose rows are kept here{hint}{nearest(task, tasks)}")
    store = Store(run.recipe.runtime.store)
    for name in tasks if task is None else [task]:
        first, *_, last = run.recipe.models
        refs = {model: Ref(*run.evaluated[name][model].split("/")) for model in (first, last)}
        for ref in refs.values():
            if not store.has(ref):
                raise ValueError(f"{ref} is not in the store {run.recipe.runtime.store}; run again to make it")
        tables = [read_rows(store.path(ref)) for ref in refs.values()]
        changes: tuple[Change, ...] = ("won", "lost", "same")
        for change, pairs in zip(changes, by_change(*tables), strict=True):
            if only in (None, change):
                yield from (_plain(name, change, dict(zip(refs, pair, strict=True))) for pair in pairs)


def _plain(task: str, change: Change, by_model: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    *_, last = by_model.values()
    return {
        "task": task,
        "row_id": last["row_id"],
        "change": change,
        "score": {model: row["score"] for model, row in by_model.items()},
        "asked": last["prompt"],
        "wanted": last["answer"],
        **{model: row["outputs"] for model, row in by_model.items()},
    }


def as_text(row: Mapping[str, Any]) -> Text:
    """row: as `answers` gives it."""
    from steps.console import styled

    scores = " → ".join(f"{score:.4g}" for score in row["score"].values())
    title = f"{row['task']}  {row['change']}: {scores}"
    text = styled((title, STYLES[row["change"]]), (f"  row {row['row_id']}\n", "dim"))
    parts = [("asked", row["asked"]), ("wanted", row["wanted"])]
    parts += [(model, output) for model in row["score"] for output in row[model]]
    for name, message in parts:
        lines = (message or "-").strip("\n").split("\n")
        text.append_text(styled((f"  {name:<7}", "dim"), "\n         ".join(lines) + "\n"))
    return text
