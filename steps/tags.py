"""Tags of a run, by which the Metaflow UI and client filter: its recipe, model, strategy, and the source's commit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sft_core.pins import is_local
from sft_core.source_code import SourceCode, source_code, told

if TYPE_CHECKING:
    from sft_core.recipe import Recipe

MAX_CHARS = 500  # Metaflow refuses longer tags


def tags_of(recipe: Recipe, source: SourceCode) -> list[str]:
    """`kind:value` each. Without a git checkout there is no commit tag, without a search no strategy tag."""
    tags = {"recipe": recipe.name, "model": _model(recipe)}
    if source["commit"] is not None:
        tags["commit"] = str(told(source))
    if recipe.search is not None:
        tags["strategy"] = recipe.search.strategy
    return [f"{kind}:{value}"[:MAX_CHARS] for kind, value in tags.items()]


def _model(recipe: Recipe) -> str:
    """A hub id, the name of a local folder, or what kind of random weights."""
    name = recipe.model.model_name_or_path
    if name is None:
        return f"random {(recipe.model.config or {})['model_type']}"
    return Path(name).expanduser().resolve().name if is_local(name) else name


def tag_run(pathspec: str, recipe: Recipe) -> None:
    """Adds the tags to a run, in whatever metadata its flow uses. pathspec: FLOW/RUN."""
    from metaflow import Run, namespace

    namespace(None)  # a run on a cluster, or of another user, is in none of this process's
    Run(pathspec).add_tags(tags_of(recipe, source_code()))
