"""All search strategies by their names in a recipe: whatever the modules of strategies/ declare.

A strategy is two modules: one there with its needs and settings, and one in sft_core/search/strategies that decides.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from sft_core.recipe.search import strategies
from sft_core.recipe.search.strategy import Strategy


def declared(package: ModuleType, table: str) -> dict[str, Any]:
    """The entries of the tables of that name in all modules of a package. Raises ValueError for a name in two."""
    entries: dict[str, Any] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for name, entry in getattr(module, table).items():
            if name in entries:
                raise ValueError(f"{module.__name__}: the strategy {name!r} is declared twice; give it another name")
            entries[name] = entry
    return entries


STRATEGIES: Mapping[str, Strategy] = declared(strategies, "STRATEGIES")
