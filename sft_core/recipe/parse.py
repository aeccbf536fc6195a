"""Reads a recipe: YAML and `--set` overrides become the typed Recipe, or a message about each wrong key and value.

Every message names the key, the value found there and the values allowed.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError

from sft_core.recipe.datasets.dataset import Dataset
from sft_core.recipe.datasets.union import (
    NO_KIND,
    TAGS,
    explain_foreign_key,
    explain_no_kind,
    parse_dataset,
    without_idle_keys,
)
from sft_core.recipe.recipe import PHASE_KEYS, Phase, Recipe
from sft_core.recipe.wording import nearest, short
from sft_core.rounds import ONLY

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


def read_yaml(text: str, name: str = "the recipe") -> dict[str, Any]:
    """YAML 1.2 text as plain JSON-able data: `1e-5` is a number, a key that stands twice is an error.

    name: what the text is, for a message.
    """
    data = _parse_yaml(text, name)
    if not isinstance(data, dict):
        kind = "nothing" if data is None else type(data).__name__
        raise ValueError(f"{name}: found {kind}; a recipe is a mapping of sections")
    return data


def _parse_yaml(text: str, name: str) -> Any:
    """The value as JSON has it. name: what the text is, for the message."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return json.loads(json.dumps(YAML(typ="safe", pure=True).load(io.StringIO(text)), default=str))
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{name} is not valid YAML: {error}") from None


def parse_recipe(data: dict[str, Any]) -> Recipe:
    """The typed recipe of plain data. Raises ValueError that lists every wrong key."""
    try:
        return Recipe.model_validate_json(json.dumps(_with_phases(data)))
    except ValidationError as error:
        problems = error.errors()
        # pydantic also calls a list too short when its members are faulty: name the members alone.
        shown = [p for p in problems if p["type"] != "too_short" or not any(_is_inside(q, p) for q in problems)]
        raise ValueError("\n".join(_explain(problem, "phases" in data) for problem in shown)) from None


def _with_phases(data: dict[str, Any]) -> dict[str, Any]:
    """The data with the keys of its phase below `phases`, where Recipe has them, and without idle keys of datasets.

    Raises ValueError for a phase's key beside `phases`.
    """
    at_root = [key for key in PHASE_KEYS if key in data]
    if "phases" in data and at_root:
        raise ValueError(f"{at_root[0]}: found beside phases; each phase has its own: phases.NAME.{at_root[0]}")
    phases = data["phases"] if "phases" in data else {ONLY: {key: data[key] for key in at_root}}
    if isinstance(phases, dict):
        phases = {name: _without_idle_keys(phase) for name, phase in phases.items()}
    return {**{key: value for key, value in data.items() if key not in at_root}, "phases": phases}


def _without_idle_keys(phase: Any) -> Any:
    mixture = phase.get("dataset_mixture") if isinstance(phase, dict) else None
    if not isinstance(mixture, dict) or not isinstance(mixture.get("datasets"), list):
        return phase
    datasets = [without_idle_keys(dataset) for dataset in mixture["datasets"]]
    return {**phase, "dataset_mixture": {**mixture, "datasets": datasets}}


def load_recipe(path: str | Path, *, overrides: tuple[str, ...] = (), limit: int | None = None) -> Recipe:
    """The recipe in a YAML file, with `key=value` overrides and a row limit applied.

    Raises ValueError for a wrong key or value and FileNotFoundError for a missing file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe (looked in {Path.cwd()})")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: a recipe is UTF-8 text; byte {error.start} is not") from None
    return parse_recipe(override(read_yaml(text, str(path)), overrides, limit))


def override(data: dict[str, Any], overrides: tuple[str, ...], limit: int | None = None) -> dict[str, Any]:
    """A copy of the data with `section.key=value` set (values are YAML; a source by its name or index).

    >>> override({"training": {"seed": 1}}, ("training.learning_rate=1e-5",))
    {'training': {'seed': 1, 'learning_rate': 1e-05}}
    """
    data = json.loads(json.dumps(data))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set {text}: expected section.key=value, for example training.learning_rate=1e-5")
        node: Any = data
        *parents, last = _split_key(key.strip(), _source_names(data))
        for parent in parents:
            node = _child(node, parent, text)
        if isinstance(node, list):
            raise ValueError(f"--set {text}: {parents[-1]} is a list; name the element and its key")
        if not isinstance(node, dict):
            raise ValueError(f"--set {text}: {last!r} is below a value that holds no keys")
        node[last] = _parse_yaml(value, f"--set {text}: the value") if value.strip() else None
    if limit is not None:
        data["limit"] = limit
    return data


def _source_names(data: Any) -> list[str | None]:
    """The names of all datasets in plain data, which may be faulty anywhere."""
    phases = data.get("phases")
    names = []
    for phase in [data, *(phases.values() if isinstance(phases, dict) else ())]:
        mixture = phase.get("dataset_mixture") if isinstance(phase, dict) else None
        datasets = mixture.get("datasets") if isinstance(mixture, dict) else None
        names += [_source_of(element) for element in datasets] if isinstance(datasets, list) else []
    return names


def _split_key(key: str, source_names: list[str | None]) -> list[str]:
    """The key cut at its dots. Dots in a source's name, as in OpenHermes_2.5, cut nothing."""
    pieces, parts = key.split("."), []
    while pieces:
        size = next((n for n in range(len(pieces), 1, -1) if ".".join(pieces[:n]) in source_names), 1)
        parts.append(".".join(pieces[:size]))
        pieces = pieces[size:]
    return parts


def _child(node: Any, name: str, text: str) -> Any:
    """The value below `node`, which is made where it is missing. text: the override, for the message."""
    if isinstance(node, list):
        for index, element in enumerate(node):
            if name in (str(index), _source_of(element)):
                return element
        raise ValueError(f"--set {text}: no element {name!r}; use a source's name or its index from 0")
    if not isinstance(node, dict):
        raise ValueError(f"--set {text}: {name!r} is below a value that holds no keys")
    if node.get(name) is None:
        node[name] = {}
    return node[name]


def _source_of(element: Any) -> str | None:
    """The name of a dataset in plain data. A faulty dataset still has the name that it states."""
    with contextlib.suppress(ValidationError):
        return parse_dataset(element).source
    return element.get("name") if isinstance(element, dict) else None


def _is_inside(problem: ErrorDetails, outer: ErrorDetails) -> bool:
    depth = len(outer["loc"])
    return len(problem["loc"]) > depth and problem["loc"][:depth] == outer["loc"]


def _explain(problem: ErrorDetails, has_phases: bool) -> str:
    where, section, fields = _locate(problem["loc"], has_phases)
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        key = str(problem["loc"][-1])
        foreign = explain_foreign_key(section, key) if section is not None and issubclass(section, Dataset) else None
        return f"{where}: {foreign or f'unknown key{nearest(key, fields)}'}"
    if problem["type"] == NO_KIND:
        unknown, message = explain_no_kind(problem["input"])
        return f"{where}.{unknown}: {message}" if unknown is not None else f"{where}: {message}"
    if problem["type"] == "missing":
        return f"{where}: missing; it has no default"
    if problem["type"] == "value_error":
        is_of_phase = has_phases and len(problem["loc"]) == 2 and problem["loc"][0] == "phases"
        return f"{where}{'.' if is_of_phase else ': '}{message}" if where else message
    return f"{where or 'the recipe'}: found {short(problem['input'])}; {message[0].lower()}{message[1:]}"


def _is_union_member(part: str) -> bool:
    """Whether pydantic put the part into an error's place to name a member of a union: it is no key."""
    return part in ("str", "tuple[str, ...]") or part.startswith("dict[")


def _locate(loc: tuple[str | int, ...], has_phases: bool) -> tuple[str, type[BaseModel] | None, list[str]]:
    """(key, section, names): the key in a user's words, the section that holds it, and the names known there."""
    where = ""
    holder: type[BaseModel] | None = None
    model: type[BaseModel] | None = Recipe
    fields = [*Recipe.model_fields, *(() if has_phases else PHASE_KEYS)]
    if loc[:1] == ("phases",) and len(loc) > 1:
        where = f"phases.{loc[1]}" if has_phases else ""
        model, loc = Phase, loc[2:]
    for part in loc:
        if isinstance(part, int):
            where += f"[{part}]"
            continue
        if part in TAGS:
            model = TAGS[part]
            fields = list(model.model_fields)
            continue
        if _is_union_member(part):
            continue
        where += f".{part}" if where else str(part)
        holder = model
        if model is not Recipe:
            fields = list(model.model_fields) if model is not None else []
        field = model.model_fields.get(part) if model is not None else None
        model = _section_of(field.annotation) if field is not None else None
        if model is not None and part != loc[-1]:
            fields = list(model.model_fields)
    return where, holder, fields


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((section for arg in get_args(annotation) if (section := _section_of(arg))), None)
