"""The source of each dataset, looked up by the name of the dataset's kind.

No builder imports this module: stages name the reader's module, so that a new kind changes no key.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sft_core.recipe.datasets.dataset import Dataset
from sft_core.recipe.datasets.union import KINDS

if TYPE_CHECKING:
    from sft_core.data.sources.source import Source

_PACKAGE = __name__.rpartition(".")[0]


def source_of(dataset: Dataset) -> Source:
    """The source that reads a dataset of the recipe."""
    source: Source = _class_of(dataset.kind())(dataset)
    return source


def reader_module(dataset: Dataset) -> str:
    """The module whose code reads the dataset: part of the identity of what is read."""
    return f"{_PACKAGE}.{dataset.kind()}"


def origin_of(section: Mapping[str, Any], list_files: Callable[[], list[str]]) -> dict[str, Any]:
    """Where stored conversations come from, as the kind that wrote the section says it; the pin for an unknown kind."""
    origins = (_class_of(dataset.kind()).origin(section, list_files) for dataset in KINDS.values())
    return next((origin for origin in origins if origin is not None), {"pin": section["pin"]})


@functools.cache
def _class_of(kind: str) -> Any:
    return importlib.import_module(f"{_PACKAGE}.{kind}").SOURCE
