"""An import's result: our recipe as plain data, and an account of every key of the other recipe."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from sft_core.recipe.sections import Lora, Model, Packing, Runtime, Training

_SECTIONS: dict[str, type[BaseModel]] = {
    "model": Model,
    "packing": Packing,
    "training": Training,
    "training.lora": Lora,
    "runtime": Runtime,
}
_SWITCHES = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


@dataclasses.dataclass
class Imported:
    """Each key of the input is in one of unread, carried, changed and not_carried; after the import, unread is empty.

    Our keys are dotted paths into data.
    """

    data: dict[str, Any]
    unread: dict[str, Any]  # the input's keys without an account so far
    template: str | None = None  # the text of an inline chat template
    carried: dict[str, str] = dataclasses.field(default_factory=dict)  # {its key: our key}
    changed: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)  # {its key: (our key, the change)}
    not_carried: dict[str, str] = dataclasses.field(default_factory=dict)  # {its key: why}
    assumed: dict[str, str] = dataclasses.field(default_factory=dict)  # {our key that the input leaves out: why}

    def get(self, ours: str) -> Any:
        """The value at one of our keys, or None."""
        node: Any = self.data
        for part in re.findall(r"[^.\[\]]+", ours):
            node = node[int(part)] if isinstance(node, list) else node.get(part) if isinstance(node, dict) else None
        return node

    def put(self, ours: str, value: Any) -> None:
        *sections, last = ours.split(".")
        node = self.data
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value

    def change(self, key: str, ours: str, value: Any, explanation: str) -> None:
        self.put(ours, value)
        self.changed[key] = (ours, explanation)

    def assume(self, ours: str, value: Any, why: str) -> None:
        self.put(ours, value)
        self.assumed[ours] = why

    def carry(self, key: str, ours: str, value: Any) -> bool:
        """Puts the value, read as TRL would read it, under our key; lists it as not carried if our recipe refuses it.

        Returns whether it was carried.
        """
        section, _, field = ours.rpartition(".")
        refused = ""
        for reading in readings(value):
            try:
                _validate(_SECTIONS.get(section), field, reading)
            except ValidationError as error:
                refused = refused or error.errors()[0]["msg"].removeprefix("Value error, ").lower()
                continue
            self.put(ours, reading)
            self.carried[key] = ours
            return True
        self.not_carried[key] = f"{ours}: found {short(value)}; {refused}"
        return False


def _validate(model: type[BaseModel] | None, field: str, value: Any) -> None:
    if model is not None:
        data: dict[str, Any] = {"model_name_or_path": "any/model"} if model is Model else {}
        model.model_validate_json(json.dumps({**data, field: value}))


def readings(value: Any) -> Iterator[Any]:
    """The values that TRL may read: PyYAML, unlike our YAML 1.2, leaves 1e-5 a text and makes yes and off bools."""
    if (as_number := number(value)) is not None:
        yield as_number
        if as_number == int(as_number):
            yield int(as_number)
    if isinstance(value, str) and value.lower() in _SWITCHES:
        yield switch(value)
    if isinstance(value, str) and value.lstrip().startswith("{"):
        with contextlib.suppress(ValueError):  # a text, then
            yield json.loads(value)
    yield value


def number(value: Any) -> int | float | None:
    """The value as a number, also from text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if not isinstance(value, str):
        return value if math.isfinite(value) else None
    if not _NUMBER.fullmatch(value.strip()):
        return None
    return int(value) if re.fullmatch(r"[+-]?\d+", value.strip()) else float(value)


def switch(value: Any) -> bool:
    """Whether a value turns something on."""
    return _SWITCHES.get(value.lower(), True) if isinstance(value, str) else bool(value)


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
