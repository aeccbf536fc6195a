"""What base and tuned model answered, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from sft_core.evaluate.comparison import by_change
from sft_core.evaluate.rows import read_rows
from sft_core.measuring import LM_EVAL
from sft_core.store.ref import Ref
from sft_core.store.store import Store
from sft_core.wording import nearest

if TYPE_CHECKING:
    from rich.text import Text

    from steps.runs import Recorded

Change = Literal["won", "lost", "same"]
STYLES: dict[Change, str] = {"won": "bold green", "lost": "bold red", "same": "bold"}


def answers(run: Recorded, task: str | None, only: Change | None) -> Iterator[dict[str, Any]]:
    """{task, row_id, change, score, asked, wanted, base, tuned} of each row of a run that was asked, task by task.

    Rows that were won or lost come first. score, base and tuned hold a model's values: base and tuned an output a
    sample. Raises ValueError for an unknown task, and for outputs that are not there.
    """
    own = [name for name in run.evaluated if not name.startswith(LM_EVAL)]
    if task is not None and task not in own:
        hint = "; those of lm-eval are in the samples.jsonl of its output" if task.startswith(LM_EVAL) else ""
        raise ValueError(f"--task: found {task!r}; it is no task whose rows are kept here{hint}{nearest(task, own)}")
    store = Store(run.recipe.runtime.store)
    for name in own if task is None else [task]:
        refs = {model: Ref(*run.evaluated[name][model].split("/")) for model in ("base", "tuned")}
        for ref in refs.values():
            if not store.has(ref):
                raise ValueError(f"{ref} is not in the store {run.recipe.runtime.store}; run again to make it")
        tables = [read_rows(store.path(ref)) for ref in refs.values()]
        changes: tuple[Change, ...] = ("won", "lost", "same")
        for change, pairs in zip(changes, by_change(*tables), strict=True):
            if only in (None, change):
                yield from (_plain(name, change, *pair) for pair in pairs)


def _plain(task: str, change: Change, base: dict[str, Any], tuned: dict[str, Any]) -> dict[str, Any]:
    return {
        "task": task,
        "row_id": tuned["row_id"],
        "change": change,
        "score": {"base": base["score"], "tuned": tuned["score"]},
        "asked": tuned["prompt"],
        "wanted": tuned["answer"],
        "base": base["outputs"],
        "tuned": tuned["outputs"],
    }


def as_text(row: dict[str, Any]) -> Text:
    from rich.text import Text

    title = f"{row['task']}  {row['change']}: {row['score']['base']:.4g} → {row['score']['tuned']:.4g}"
    text = Text.assemble((title, STYLES[row["change"]]), (f"  row {row['row_id']}\n", "dim"))
    parts = [("asked", row["asked"]), ("wanted", row["wanted"])]
    parts += [(model, output) for model in ("base", "tuned") for output in row[model]]
    for name, said in parts:
        lines = (said or "-").strip("\n").split("\n")
        text.append(f"  {name:<7}", "dim").append("\n         ".join(lines) + "\n")
    return text
