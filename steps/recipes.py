"""The recipe on its way into the flow: YAML text to plain data for Metaflow, and back to the typed recipe."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sft_core.recipe import Recipe
    from sft_core.store import Store


def parse_config(text: str) -> dict[str, Any]:
    """Plain data of a recipe that is valid. Raises MetaflowException, which shows without a traceback."""
    from metaflow.exception import MetaflowException

    from sft_core.recipe import parse_recipe, read_yaml

    class InvalidRecipe(MetaflowException):
        headline = "The recipe is not valid"

    try:
        data = read_yaml(text)
        recipe = parse_recipe(data)
    except ValueError as error:
        raise InvalidRecipe(str(error)) from None
    return {**data, "runtime": recipe.runtime.model_dump(mode="json")}  # whole: decorators of the flow read it


def effective(data: Mapping[str, Any], overrides: Iterable[str] | None, limit: int | None) -> Recipe:
    """The typed recipe after `--set` and `--limit`. Raises ValueError."""
    # Not at the top: the flow file imports this module, and every task and card pays for what that imports.
    from sft_core.recipe import override, parse_recipe

    return parse_recipe(override(dict(data), tuple(overrides or ()), limit))


@functools.cache  # behind a URL a store lists its bucket once in a process
def open_store(address: str) -> Store:
    from sft_core.store import Store

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return Store(address)
