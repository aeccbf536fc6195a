"""The code and the libraries that made an output whose identity has a version in place of them; and how they changed.

An identity with a version costs nobody a new training for a patch. What was made by other code is told instead.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from typing import TypedDict

from sft_core.store.code_digest import module_digests


class MadeBy(TypedDict):
    modules: dict[str, str]  # digests by name
    libraries: dict[str, str | None]  # versions; None: not installed


def made_by(modules: Iterable[str], libraries: Iterable[str]) -> MadeBy:
    """modules: their closures count, too."""
    return {"modules": module_digests(*modules), "libraries": {name: _version(name) for name in libraries}}


def drift(before: MadeBy, now: MadeBy, *, name: str = "now") -> str | None:
    """How the code and the libraries differ from those that made an output; None where they are the same.

    name: what the other code and libraries are, in the text.
    """
    libraries = [
        f"{library} {version or 'not installed'} ({name}: {current or 'not installed'})"
        for library, version in before["libraries"].items()
        if (current := now["libraries"].get(library, version)) != version
    ]
    names = sorted(before["modules"].keys() | now["modules"].keys())
    changed = [name for name in names if before["modules"].get(name) != now["modules"].get(name)]
    if changed:
        files = ", ".join(f"{name.replace('.', '/')}.py" for name in changed[:3])
        libraries.append(f"other code of {files}" + (f" and {len(changed) - 3} more" if changed[3:] else ""))
    return f"made by {', '.join(libraries)}" if libraries else None


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
