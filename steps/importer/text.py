"""What an import shows: our recipe as YAML with comments, and the account for a person."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import BaseModel

from sft_core.recipe.datasets.dataset import Dataset
from sft_core.recipe.datasets.mixture import DatasetMixture
from sft_core.recipe.datasets.union import section_of
from sft_core.recipe.recipe import ROOT_KEYS, Recipe
from sft_core.recipe.sections import Lora, Model, Packing, Runtime, Training
from steps.importer.account import Imported, short

# By the keys that hold them; what is not here is written in one line.
_SECTIONS: dict[str, type[BaseModel]] = {
    "model": Model,
    "dataset_mixture": DatasetMixture,
    "packing": Packing,
    "training": Training,
    "lora": Lora,
    "runtime": Runtime,
}
_OTHERS = ("chat_template", "extra")  # sections of which any order of keys is as good


def recipe_text(found: Imported, header: str) -> str:
    """YAML of the recipe, in the order in which one is read about, with a comment where a value is not the input's."""
    told = {ours: text for ours, text in found.changed.values()} | found.assumed
    lines = [f"# {header}"]
    for line in _mapping(found.data, Recipe, "", "", told):
        is_section = line.endswith(":") and not line.startswith(" ")
        lines += ["", line] if is_section else [line]
    return "\n".join(lines) + "\n"


def _mapping(
    data: dict[str, Any], section: type[BaseModel] | None, where: str, indent: str, told: dict[str, str]
) -> list[str]:
    lines = []
    for key in [key for key in _keys(section, data) if key in data]:
        value, comment = data[key], f"  # {told[where + key]}" if where + key in told else ""
        below = _SECTIONS.get(key)
        if key == "datasets":
            lines.append(f"{indent}{key}:{comment}")
            for index, element in enumerate(value):
                place = f"{where}{key}[{index}]."
                first, *others = _mapping(element, section_of(element), place, f"{indent}    ", told)
                lines += [f"{indent}  - {first.strip()}", *others]
        elif (below or key in _OTHERS) and value:
            lines += [f"{indent}{key}:{comment}", *_mapping(value, below, f"{where}{key}.", f"{indent}  ", told)]
        else:
            lines.append(f"{indent}{key}: {json.dumps(value, ensure_ascii=False)}{comment}")
    return lines


def _keys(section: type[BaseModel] | None, data: dict[str, Any]) -> list[str]:
    """In the order in which a person reads them; of no section as they stand in the data."""
    if section is None:
        return list(data)
    if section is Recipe:
        return ROOT_KEYS
    return section.ordered_keys() if issubclass(section, Dataset) else list(section.model_fields)


def account_text(found: Imported) -> str:
    """For a person: what became of each key. Values of keys that are not carried are not shown; some are secrets."""
    titles = {
        "carried with a change": {key: f"{ours}: {text}" for key, (ours, text) in found.changed.items()},
        "not carried": found.not_carried,
        "not in the file": {ours: _assumption(found, ours, why) for ours, why in found.assumed.items()},
    }
    parts = [f"carried as they are: {', '.join(_numbered(dict.fromkeys(found.carried, '')))}"] if found.carried else []
    for title, told in titles.items():
        if told:
            parts.append("\n".join([f"{title}:", *(f"  {key}: {text}" for key, text in _numbered(told).items())]))
    return "\n\n".join(parts)


def _assumption(found: Imported, ours: str, why: str) -> str:
    value = found.get(ours)
    return why if value is None or "[" in ours else f"{short(value)}; {why}"


def _numbered(told: dict[str, str]) -> dict[str, str]:
    """Keys of a list's elements once for those that are told the same: 25 data sets are as one."""
    groups: dict[tuple[str, str], list[str]] = {}
    for key, text in told.items():
        groups.setdefault((re.sub(r"\[\d+\]", "[]", key), text), []).append(key)
    return {
        f"{general} ({len(keys)} times)" if len(keys) > 1 else keys[0]: text for (general, text), keys in groups.items()
    }
