"""Runs of an older flow. Metaflow's resume of such a run dies with an internal error, so it is refused before."""

from __future__ import annotations

import ast
import shlex
from pathlib import Path

from sft_core.local_files import is_local
from sft_core.rounds import ONLY
from steps.runs.recorded import Attempt, Beginning, beginning


def check_resumable(run: Attempt, flow: Path) -> None:
    """Raises ValueError for a run with a step that the flow in this file lacks. The message says how to start anew."""
    steps = steps_of(flow)
    gone = [step for step in run.steps if step not in steps]
    if gone:
        command = ["python", "flows/sft_flow.py", "--config", "recipe", "RECIPE", "run", *options(beginning(run.id))]
        raise ValueError(
            f"run {run.id} is of an older flow, with a step {gone[0]!r} that this one lacks, so it cannot be resumed; "
            f"start its recipe anew, and what it stored is found again: {shlex.join(command)}"
        )


def steps_of(flow: Path) -> set[str]:
    """The names of the flow's steps, read off its source: an import of the flow would start Metaflow."""
    functions = (node for node in ast.walk(ast.parse(flow.read_text())) if isinstance(node, ast.FunctionDef))
    return {each.name for each in functions if any(ast.unparse(mark) == "step" for mark in each.decorator_list)}


def options(run: Beginning) -> list[str]:
    """The options with which a new run begins as this one did: the run's options, and the commits of its hub names."""
    recipe, pins, overrides, limit = run
    name, revisions = recipe.model.model_name_or_path, {}
    if name is not None and not is_local(name):
        revisions["model.model_revision"] = recipe.model.model_revision, pins["model"]
    for phase, keys in recipe.phases.items():
        section = "dataset_mixture" if [*recipe.phases] == [ONLY] else f"phases.{phase}.dataset_mixture"
        for dataset in keys.dataset_mixture.datasets:
            if (revision := getattr(dataset, "revision", None)) is not None:
                key = f"{section}.datasets.{dataset.source}.revision"
                revisions[key] = revision, pins["sources"][dataset.source]
    commits = [f"{key}={commit}" for key, (revision, commit) in revisions.items() if commit not in (None, revision)]
    return [
        *(word for text in [*overrides, *commits] for word in ("--set", text)),
        *([] if limit is None else ["--limit", str(limit)]),
    ]
