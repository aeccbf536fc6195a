"""The recipe on its way into the flow: YAML text to plain data for Metaflow, and back to the typed recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sft_core.recipe import Recipe, override, parse_recipe, read_yaml


def parse_config(text: str) -> dict[str, Any]:
    """Plain data of a recipe that is valid. Raises MetaflowException, which shows without a traceback."""
    from metaflow.exception import MetaflowException

    class InvalidRecipe(MetaflowException):
        headline = "The recipe is not valid"

    try:
        data = read_yaml(text)
        parse_recipe(data)
    except ValueError as error:
        raise InvalidRecipe(str(error)) from None
    return data


def effective(data: Mapping[str, Any], overrides: Iterable[str] | None, limit: int | None) -> Recipe:
    """The typed recipe after `--set` and `--limit`. Raises ValueError."""
    return parse_recipe(override(dict(data), tuple(overrides or ()), limit))
