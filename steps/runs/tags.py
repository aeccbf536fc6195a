"""Tags of a run, by which the Metaflow UI and client filter: its recipe, model, strategy, and the source's commit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from sft_core.local_files import is_local
from sft_core.store.provenance import SourceCode, source_code, source_label
from steps.runs.recorded import RESUMES, Attempt

if TYPE_CHECKING:
    from sft_core.recipe.recipe import Recipe

log = logging.getLogger(__name__)
MAX_CHARS = 500  # Metaflow refuses longer tags


def tags_of(recipe: Recipe, source: SourceCode) -> list[str]:
    """`kind:value` each. Without a git checkout there is no commit tag, without a search no strategy tag."""
    tags = {"recipe": recipe.name, "model": _model(recipe), **_commit(source)}
    strategies = dict.fromkeys(phase.search.strategy for phase in recipe.phases.values() if phase.search is not None)
    return [
        f"{kind}:{value}"[:MAX_CHARS]
        for kind, value in [*tags.items(), *(("strategy", strategy) for strategy in strategies)]
    ]


def resumed_tags(run: Attempt, source: SourceCode) -> list[str]:
    """The tags of a resume: those of the run that it continues, with that run's id and the commit of the source."""
    kept = [tag for tag in run.tags if not tag.startswith(("commit:", RESUMES))]
    return [*kept, *(f"{kind}:{value}" for kind, value in _commit(source).items()), f"{RESUMES}{run.id}"]


def _commit(source: SourceCode) -> dict[str, str]:
    return {} if source["commit"] is None else {"commit": str(source_label(source))}


def _model(recipe: Recipe) -> str:
    """A hub id, the name of a local folder, or what kind of random weights."""
    name = recipe.model.model_name_or_path
    if name is None:
        return f"random {(recipe.model.config or {})['model_type']}"
    return Path(name).expanduser().resolve().name if is_local(name) else name


def tag_run(pathspec: str, recipe: Recipe) -> None:
    """Adds the tags to a run, in whatever metadata its flow uses. pathspec: FLOW/RUN.

    A task on another machine than the scheduler's, without a metadata service, knows no run: then there are no tags.
    """
    from metaflow import Run, namespace
    from metaflow.exception import MetaflowNotFound

    namespace(None)  # a run on a cluster, or of another user, is in none of this process's
    tags = tags_of(recipe, source_code())
    try:
        run = Run(pathspec)
    except MetaflowNotFound:
        log.warning("run=%s status=untagged this machine's metadata does not know the run; tags=%s", pathspec, tags)
        return
    run.add_tags(tags)
