"""The flow's runs, as Metaflow recorded them."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from sft_core.recipe.recipe import Recipe
    from sft_core.report.rows import ThinkingGain

FLOW = "SFTFlow"
LATEST = "latest"
RESUMES = "resumes:"  # before a run's id, in the tag of a resume
# The steps whose output a command can be asked for, and the artifact that holds its address.
OUTPUTS = {
    "mix": "mixture",
    "pack": "packed",
    "train": "trained",
    "train_on_nodes": "trained",
    "fan_out": "delivered",  # the name of evaluate_all in older runs
    "evaluate_all": "delivered",
    "report": "scored",
    "end": "released",
}
NUM_NAMED = 10  # of the runs that an error names


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A run and its outputs; of an unfinished run, those of its finished steps."""

    id: str
    created: str
    is_finished: bool
    commit: str | None
    recipe: Recipe
    outputs: dict[str, str]  # by the artifact's name: stage/key
    evaluated: dict[str, dict[str, str]]  # {task: {"base"|"tuned": stage/key}}


class Attempt(NamedTuple):
    id: str
    tags: list[str]  # those that the flow or somebody gave it
    steps: list[str]  # that have begun


class Beginning(NamedTuple):
    """The inputs of a run. overrides, limit: its options `--set` and `--limit`; the recipe already contains them."""

    recipe: Recipe
    pins: dict[str, Any]
    overrides: list[str]
    limit: int | None


def last_attempt() -> Attempt:
    """The newest run or resume, finished or not. Raises ValueError if there is none.

    An attempt that was killed before its first step has nothing to resume, so the one before it counts. Of a resume and
    the attempts that it continues, the one with the most finished tasks counts: a resume that is killed while Metaflow
    copies finished tasks into it has fewer, and would pin the names of the hub anew.
    """
    runs = _runs()
    attempts = [next((run for run in runs if any(True for _ in run)), runs[0])]
    by_id = {run.id: run for run in runs}
    while (origin := by_id.get(_resumed(attempts[-1]))) is not None:
        attempts.append(origin)
    run = max(attempts, key=lambda run: sum(task.successful for step in run for task in step))
    return Attempt(str(run.id), sorted(run.user_tags), [step.id for step in run])


def _resumed(run: Any) -> str | None:
    """The id of the run that a resume continues."""
    tagged = [tag.removeprefix(RESUMES) for tag in run.user_tags if tag.startswith(RESUMES)]
    return tagged[0] if tagged else (run.origin_pathspec or "").rpartition("/")[2] if any(True for _ in run) else None


def beginning(run: str) -> Beginning:
    """The inputs of a run whose `start` is done."""
    from metaflow import Run

    from steps.runs.recipes import effective

    parameters, start = (Run(f"{FLOW}/{run}")[step].task for step in ("_parameters", "start"))
    assert parameters is not None and start is not None, "the run has begun"
    data = parameters.data
    return Beginning(effective(data.recipe, data.set, data.limit), start.data.pins, list(data.set or ()), data.limit)


def failed_tasks(run: str) -> dict[str, str]:
    """{task: why} of the evaluations that failed in a run whose other steps are done; empty for any other run."""
    from metaflow import Step
    from metaflow.exception import MetaflowNotFound

    try:
        report = Step(f"{FLOW}/{run}/report").task
    except MetaflowNotFound:
        return {}
    return report.data.failed if report is not None and report.successful else {}


class Finished(NamedTuple):
    """The report of a finished run. gains: the gains by thinking. pushed: the checkpoint's address on the hub."""

    scores: list[dict[str, Any]]
    gains: list[ThinkingGain]
    checkpoint: str
    pushed: str | None


def last_finished() -> Finished:
    """The report of the newest finished run. Raises ValueError where there is none."""
    for run in _runs():
        if run.successful:
            data = run["end"].task.data
            return Finished(data.scores, data.thinking, data.checkpoint, getattr(data, "hub_url", None))
    raise ValueError("no run has finished yet; start one with `python flows/sft_flow.py run`")


def is_run(name: str) -> bool:
    """Whether a name can only be a run: `latest`, or an id in Metaflow's or Argo's format."""
    return name == LATEST or name.startswith((f"{FLOW}/", "argo-")) or name.isdigit()


def recorded(name: str) -> Recorded:
    """The run of that id (or FLOW/id), or the newest one for `latest`. Raises ValueError that names those known."""
    from steps.runs.recipes import effective

    runs = [run for run in _runs() if "_parameters" in run]  # a run without them was killed before its first step
    run = next((run for run in runs if name in (LATEST, run.id, run.pathspec)), None)
    if run is None:
        named = ", ".join(run.id for run in runs[:NUM_NAMED]) + (", ..." if len(runs) > NUM_NAMED else "")
        raise ValueError(f"found {name!r}; it is no run. The runs recorded here, newest first: {named or 'none'}")
    data = run["_parameters"].task.data
    recipe = effective(data.recipe, data.set, data.limit)
    commits = [tag.partition(":")[2] for tag in run.user_tags if tag.startswith("commit:")]
    return Recorded(
        id=run.id,
        created=f"{run.created_at:%Y-%m-%d %H:%M}",
        is_finished=bool(run.successful),
        commit=commits[0] if commits else None,
        recipe=recipe,
        outputs=_outputs(run),
        evaluated=_evaluated(run, recipe),
    )


def _evaluated(run: Any, recipe: Recipe) -> dict[str, dict[str, str]]:
    """In the order of the recipe's tasks."""
    by_task: dict[str, dict[str, str]] = {}
    for data in _done(run, "evaluate"):
        evaluated = getattr(data, "evaluated", {})
        # In older runs each task has a step of its own, which holds its name and its addresses.
        by_task |= {data.task: evaluated} if hasattr(data, "task") and evaluated else evaluated
    return {task: by_task[task] for task in recipe.scored if task in by_task}


def _outputs(run: Any) -> dict[str, str]:
    addresses = {}
    for step, name in OUTPUTS.items():
        rounds = sorted(_done(run, step), key=lambda data: getattr(data, "num_rounds", 0))
        if rounds and hasattr(rounds[-1], name):
            addresses[name] = getattr(rounds[-1], name)
    return addresses


def _done(run: Any, step: str) -> list[Any]:
    return [task.data for task in run[step] if task.successful] if step in run else []


def _runs() -> list[Any]:
    os.environ.setdefault("METAFLOW_USER", os.environ.get("USER") or "sft")
    from metaflow import Flow, namespace
    from metaflow.exception import MetaflowNotFound

    from steps.runs.service import check_service

    check_service()
    namespace(None)
    try:
        runs = list(Flow(FLOW))
    except MetaflowNotFound:
        runs = []
    if not runs:
        raise ValueError("no run is recorded here; start one with `python flows/sft_flow.py run`")
    return sorted(runs, key=lambda run: run.created_at, reverse=True)
