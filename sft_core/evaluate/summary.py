"""The scores of all tasks in one place: the table, and what thinking gains where both modes have the same prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sft_core.evaluate.metrics import paired_gain
from sft_core.evaluate.rows import read_rows
from sft_core.report.tables import HEADER, markdown_table, score_rows
from sft_core.sections import LM_EVAL

if TYPE_CHECKING:
    from sft_core.store import Build

THINK, NO_THINK = "_think", "_no_think"
GAIN_HEADER = ("task", "n", "no_think", "think", "gain", "low", "high")


def build_report(build: Build, *, recipe: str, tasks: list[str]) -> dict[str, Any]:
    """Writes scores.json and report.md, and gives the same rows as counts."""
    found = {
        task: {
            model: json.loads((build.inputs[f"{model}.{task}"] / "scores.json").read_text())
            for model in ("base", "tuned")
        }
        for task in tasks
    }
    scores = score_rows(found)
    gains = thinking_gains({task: build.inputs[f"tuned.{task}"] for task in tasks if not task.startswith(LM_EVAL)})
    (build.out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    sections = [f"# {recipe}", markdown_table(HEADER, [tuple(row.values()) for row in scores])]
    if gains:
        sections += ["## What thinking gains", markdown_table(GAIN_HEADER, [tuple(row.values()) for row in gains])]
    (build.out / "report.md").write_text("\n\n".join(sections) + "\n")
    return {"scores": scores, "thinking": gains}


def thinking_gains(folders: dict[str, Path]) -> list[dict[str, Any]]:
    """Exact match with and without thinking, for tasks NAME_think and NAME_no_think, paired by prompt."""
    gains = []
    for task, folder in folders.items():
        twin = task.removesuffix(NO_THINK) + THINK
        if not task.endswith(NO_THINK) or twin not in folders:
            continue
        without, with_thinking = _correct(read_rows(folder)), _correct(read_rows(folders[twin]))
        shared = sorted(without.keys() & with_thinking.keys())
        if len(shared) < 2:
            continue
        before, after = (np.array([rows[prompt] for prompt in shared]) for rows in (without, with_thinking))
        gain, low, high = paired_gain(before, after)
        values = {"no_think": before.mean(), "think": after.mean(), "gain": gain, "low": low, "high": high}
        name = task.removesuffix(NO_THINK)
        gains.append({"task": name, "n": len(shared)} | {key: round(float(value), 6) for key, value in values.items()})
    return gains


def _correct(rows: pa.Table) -> dict[int, bool]:
    pairs = zip(rows["prompt_hash"].to_pylist(), rows["correct"].to_pylist(), strict=True)
    return {prompt: correct for prompt, correct in pairs if correct is not None}
