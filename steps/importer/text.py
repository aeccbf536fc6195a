"""The texts of an import: our recipe as YAML with comments, and the account for a person."""

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

# Sections by their keys; any other key is written in one line.
_SECTIONS: dict[str, type[BaseModel]] = {
    "model": Model,
    "dataset_mixture": DatasetMixture,
    "packing": Packing,
    "training": Training,
    "lora": Lora,
    "runtime": Runtime,
}
_OTHERS = ("chat_template", "extra")  # sections whose keys have no set order


def recipe_text(imported: Imported, header: str) -> str:
    """The recipe's YAML in reading order, with a comment on every value that is not the input's."""
    comments = {ours: text for ours, text in imported.changed.values()} | imported.assumed
    lines = [f"# {header}"]
    for line in _mapping(imported.data, Recipe, "", "", comments):
        is_section = line.endswith(":") and not line.startswith(" ")
        lines += ["", line] if is_section else [line]
    return "\n".join(lines) + "\n"


def _mapping(
    data: dict[str, Any], section: type[BaseModel] | None, where: str, indent: str, comments: dict[str, str]
) -> list[str]:
    lines = []
    for key in [key for key in _keys(section, data) if key in data]:
        value, comment = data[key], f"  # {comments[where + key]}" if where + key in comments else ""
        below = _SECTIONS.get(key)
        if key == "datasets":
            lines.append(f"{indent}{key}:{comment}")
            for index, element in enumerate(value):
                place = f"{where}{key}[{index}]."
                first, *others = _mapping(element, section_of(element), place, f"{indent}    ", comments)
                lines += [f"{indent}  - {first.strip()}", *others]
        elif (below or key in _OTHERS) and value:
            lines += [f"{indent}{key}:{comment}", *_mapping(value, below, f"{where}{key}.", f"{indent}  ", comments)]
        else:
            lines.append(f"{indent}{key}: {json.dumps(value, ensure_ascii=False)}{comment}")
    return lines


def _keys(section: type[BaseModel] | None, data: dict[str, Any]) -> list[str]:
    """The section's keys in reading order; without a section, in the data's order."""
    if section is None:
        return list(data)
    if section is Recipe:
        return ROOT_KEYS
    return section.ordered_keys() if issubclass(section, Dataset) else list(section.model_fields)


def account_text(imported: Imported) -> str:
    """What became of each key, for a person. Hides the values of keys that are not carried: some are secrets."""
    titles = {
        "carried with a change": {key: f"{ours}: {text}" for key, (ours, text) in imported.changed.items()},
        "not carried": imported.not_carried,
        "not in the file": {ours: _assumption(imported, ours, why) for ours, why in imported.assumed.items()},
    }
    carried = ", ".join(_numbered(dict.fromkeys(imported.carried, "")))
    parts = [f"carried as they are: {carried}"] if carried else []
    for title, texts in titles.items():
        if texts:
            parts.append("\n".join([f"{title}:", *(f"  {key}: {text}" for key, text in _numbered(texts).items())]))
    return "\n\n".join(parts)


def _assumption(imported: Imported, ours: str, why: str) -> str:
    value = imported.get(ours)
    return why if value is None or "[" in ours else f"{short(value)}; {why}"


def _numbered(texts: dict[str, str]) -> dict[str, str]:
    """One entry for all elements of a list that share a text: 25 datasets become `datasets[] (25 times)`."""
    groups: dict[tuple[str, str], list[str]] = {}
    for key, text in texts.items():
        groups.setdefault((re.sub(r"\[\d+\]", "[]", key), text), []).append(key)
    return {
        f"{general} ({len(keys)} times)" if len(keys) > 1 else keys[0]: text for (general, text), keys in groups.items()
    }
