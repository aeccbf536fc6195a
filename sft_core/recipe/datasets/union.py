"""A dataset of the recipe is one of the kinds in sft_core/recipe/datasets/kinds; its keys say which.

No builder imports this module: the kinds are imported by name, which the digest of a builder's code cannot follow.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Discriminator, Tag, TypeAdapter

from sft_core.recipe.datasets import kinds
from sft_core.recipe.datasets.dataset import Dataset
from sft_core.recipe.datasets.kinds.files import FileDataset
from sft_core.recipe.wording import alternatives, nearest, short

NO_KIND = "dataset_kind"  # pydantic's type of the error for a dataset whose keys name no kind, or several


def _load_kinds() -> dict[str, type[Dataset]]:
    names = [module.name for module in pkgutil.iter_modules(kinds.__path__)]
    sections = [importlib.import_module(f"{kinds.__name__}.{name}").SECTION for name in names]
    by_key = {section.key: section for section in sorted(sections, key=lambda section: section.key)}
    assert len(by_key) == len(sections), "two kinds of dataset have the same key"
    return by_key


KINDS = _load_kinds()  # by the key that names the kind
TAGS = {section.__name__: section for section in KINDS.values()}  # pydantic puts the tag into an error's place


def section_of(data: Any) -> type[Dataset] | None:
    """The kind of a dataset in plain data; None where its keys name no kind, or several."""
    if not isinstance(data, dict):
        return None
    named = [section for key, section in KINDS.items() if data.get(key) is not None]
    return named[0] if len(named) == 1 else None


def section_claiming(text: str) -> type[Dataset]:
    """The kind of dataset that text on a command line names."""
    return next((section for section in KINDS.values() if section.claims(text)), FileDataset)


def without_idle_keys(data: Any) -> Any:
    """A dataset without idle keys: keys of other kinds that are null or have their default.

    Recipes that an earlier version wrote out hold such keys.
    """
    section = section_of(data)
    if section is None:
        return data
    idle = {
        key: field.default
        for other in KINDS.values()
        for key, field in other.model_fields.items()
        if key not in section.model_fields
    }
    return {key: value for key, value in data.items() if key not in idle or value not in (None, idle[key])}


def parse_dataset(data: Any) -> Dataset:
    """The typed dataset of plain data. Raises pydantic's ValidationError."""
    adapter: TypeAdapter[Dataset] = TypeAdapter(AnyDataset)
    return adapter.validate_json(json.dumps(without_idle_keys(data)))


def explain_no_kind(data: Any) -> tuple[str | None, str]:
    """(key, message) for a dataset whose keys name no kind or several. key: the unknown key; None without one."""
    choices = alternatives(f"{key} ({section.meaning})" for key, section in KINDS.items())
    if not isinstance(data, dict):
        return None, f"found {short(data)}; a dataset is a mapping with the key {choices}"
    known = {key for section in KINDS.values() for key in section.model_fields}
    unknown = [key for key in data if key not in known]
    if unknown:
        return unknown[0], f"unknown key{nearest(unknown[0], sorted(known))}"
    return None, f"give either {choices}"


def explain_foreign_key(section: type[Dataset], key: str) -> str | None:
    """The message for a key that only datasets of other kinds have; None where none has it."""
    owners = [other.key for other in KINDS.values() if key in other.model_fields]
    if not owners:
        return None
    return f"a dataset with {section.key} has no such key, only one with {alternatives(owners)} has; remove it"


def _tag(data: Any) -> str | None:
    section = type(data) if isinstance(data, Dataset) else section_of(data)
    return section.__name__ if section is not None else None


if TYPE_CHECKING:
    AnyDataset = Dataset
else:
    AnyDataset = Annotated[
        Union[tuple(Annotated[section, Tag(tag)] for tag, section in TAGS.items())],  # noqa: UP007
        Discriminator(_tag, custom_error_type=NO_KIND, custom_error_message="the keys name no kind of dataset"),
    ]
