"""The flow's runs, as Metaflow recorded them."""

from __future__ import annotations

import os
from typing import Any

FLOW = "SFTFlow"


def last_attempt() -> str:
    """The id of the newest run or resume, whatever became of it. Raises ValueError when there is none.

    An attempt that was killed before its first step holds nothing to go on from, so the one before it counts.
    """
    return str(next((run for run in _runs() if any(True for _ in run)), _runs()[0]).id)


def failed_tasks(run: str) -> dict[str, str]:
    """{task: why} of the evaluations that failed in a run whose other steps are done; empty for any other run."""
    from metaflow import Step
    from metaflow.exception import MetaflowNotFound

    try:
        report = Step(f"{FLOW}/{run}/report").task
    except MetaflowNotFound:
        return {}
    return report.data.failed if report is not None and report.successful else {}


def last_finished() -> dict[str, Any]:
    """What the newest finished run reports: scores, gains, where the checkpoint is. Raises ValueError for no run."""
    for run in _runs():
        if run.successful:
            data = run["end"].task.data
            found = {"scores": data.scores, "gains": data.thinking, "checkpoint": data.checkpoint}
            return {**found, "pushed": getattr(data, "hub_url", None)}
    raise ValueError("no run has finished yet; start one with `python flows/sft_flow.py run`")


def _runs() -> list[Any]:
    os.environ.setdefault("METAFLOW_USER", os.environ.get("USER") or "sft")
    from metaflow import Flow, namespace
    from metaflow.exception import MetaflowNotFound

    namespace(None)
    try:
        runs = list(Flow(FLOW))
    except MetaflowNotFound:
        runs = []
    if not runs:
        raise ValueError("no run is recorded here; start one with `python flows/sft_flow.py run`")
    return sorted(runs, key=lambda run: run.created_at, reverse=True)
