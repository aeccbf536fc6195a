"""Why two outputs, or the outputs of two recipes, have different keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sft_core.pins.pinned import pin
from sft_core.store.made_by import drift
from sft_core.store.store import Store
from steps.cli.store import existing_store
from steps.plan import differences, plan
from steps.runs.recipes import read_recipe


def explained(a: str, b: str, root: str) -> list[str]:
    """Lines: an output's name, then each key that differs. a, b: two recipe files, or two outputs (stage/key)."""
    are_recipes = Path(a).is_file() and Path(b).is_file()
    lines = []
    for name, before, after in _recipe_identities(a, b) if are_recipes else _output_identities(a, b, root):
        changes = [f"  {key}: {_short(old)} -> {_short(new)}" for key, old, new in differences(before, after)]
        lines += [name, *changes] if changes else []
    return lines if are_recipes else [*lines, *_makers(a, b, root)]


def _makers(a: str, b: str, root: str) -> list[str]:
    """The difference of the code and libraries that made two outputs; of stages with a version they are in no key."""
    store = existing_store(root)
    before, after = (store.manifest(store.find(text)).get("made_by") for text in (a, b))
    difference = before and after and drift(before, after, name=b)
    return [f"{a}: {difference}. No key depends on it"] if difference else []


def _recipe_identities(a: str, b: str) -> list[tuple[str, Any, Any]]:
    sides = []
    for path in (a, b):
        loaded = read_recipe(path)
        planned = plan(Store(loaded.runtime.store), pin(loaded, allow_unresolved=True))
        sides.append({f"{located.stage.name} {located.name}": located.identity for located in planned})
    before, after = sides
    return [(name, before.get(name, {}), after.get(name, {})) for name in dict.fromkeys([*before, *after])]


def _output_identities(a: str, b: str, root: str) -> list[tuple[str, Any, Any]]:
    store = existing_store(root)
    before, after = (store.find(text) for text in (a, b))
    return [(f"{before} and {after}", store.manifest(before)["identity"], store.manifest(after)["identity"])]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."
