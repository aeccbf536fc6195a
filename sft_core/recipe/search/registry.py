"""All search strategies by their names in a recipe: each module of strategies/ declares some.

A strategy is two modules: one there holds its needs and settings, and one in sft_core/search/strategies decides.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import TypeVar

from sft_core.recipe.search import strategies
from sft_core.recipe.search.strategy import Strategy

Entry = TypeVar("Entry")


def declared(package: ModuleType, table: str, kind: type[Entry]) -> dict[str, Entry]:
    """The entries, all of one kind, of the tables of that name in a package's modules.

    Raises ValueError for a name in two tables.
    """
    entries: dict[str, Entry] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for name, entry in getattr(module, table).items():
            if name in entries:
                raise ValueError(f"{module.__name__}: the strategy {name!r} is declared twice; give it another name")
            assert isinstance(entry, kind), f"{module.__name__}: {table}[{name!r}] is no {kind.__name__}"
            entries[name] = entry
    return entries


STRATEGIES: Mapping[str, Strategy] = declared(strategies, "STRATEGIES", Strategy)
