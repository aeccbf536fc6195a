"""The recipe as steps read it: from its file, or as plain data on its way through Metaflow.

The recipe's own code stands below the metrics and does not know their names; here they are checked.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sft_core.recipe.recipe import Recipe
    from sft_core.store.store import Store


# Imports stand in the functions: the flow file imports this module, and every task and card pays for its imports.


def read_recipe(path: str | Path, *, overrides: tuple[str, ...] = (), limit: int | None = None) -> Recipe:
    """The recipe in a YAML file. Raises ValueError and FileNotFoundError, as load_recipe does, and for its metrics."""
    from sft_core.evaluate.metrics.registry import check_names
    from sft_core.recipe.parse import load_recipe

    recipe = load_recipe(path, overrides=overrides, limit=limit)
    check_names(recipe.evaluation)
    return recipe


def parse_config(text: str) -> dict[str, Any]:
    """Plain data of a recipe that is valid. Raises MetaflowException, which shows without a traceback."""
    from metaflow.exception import MetaflowException

    from sft_core.evaluate.metrics.registry import check_names
    from sft_core.recipe.parse import parse_recipe, read_yaml
    from sft_core.report.shown import shown

    class InvalidRecipe(MetaflowException):
        headline = "The recipe is not valid"

    try:
        data = read_yaml(text)
        recipe = parse_recipe(data)
        check_names(recipe.evaluation)
    except ValueError as error:
        raise InvalidRecipe(shown(str(error))) from None
    return {
        **data,
        "runtime": recipe.runtime.model_dump(mode="json"),
    }  # complete: decorators of the flow read its default values, too


def effective(data: Mapping[str, Any], overrides: Iterable[str] | None, limit: int | None) -> Recipe:
    """The typed recipe after `--set` and `--limit`. Raises ValueError.

    Metrics that `--set` names are checked by pipeline.prepare, in `start`.
    """
    from sft_core.recipe.parse import override, parse_recipe

    return parse_recipe(override(dict(data), tuple(overrides or ()), limit))


@functools.cache  # so that a store at a URL lists its bucket once in a process
def open_store(address: str) -> Store:
    from sft_core.report.shown import log_as_text
    from sft_core.store.store import Store

    log_as_text(logging.INFO)
    return Store(address)
