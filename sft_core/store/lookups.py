"""Lookups: results that several calls of `Store.locate` for one recipe share."""

from __future__ import annotations

import json
from typing import Any

from sft_core.store.stage import Located, Part, S, Stage


class Lookups:
    """Located outputs of one subject, and the code digests of their stages: each is computed once.

    A digest is of the builder's source as it is now. Make new Lookups for each plan or step, or a code change during a
    long process goes unnoticed.
    """

    def __init__(self) -> None:
        self._located: dict[tuple[str, str], Located] = {}
        self._codes: dict[tuple[str, tuple[str, ...]], str | int] = {}

    def get(self, stage: Stage[Any], part: Part) -> Located | None:
        """Where the output is; None when it was not located before."""
        return self._located.get(_name(stage, part))

    def add(self, located: Located) -> None:
        self._located[_name(located.stage, located.part)] = located

    def code(self, stage: Stage[S], subject: S, part: Part) -> str | int:
        """The code digest of a stage, computed at the first call for the modules of the part."""
        modules = stage.modules(subject, part)
        if (stage.name, modules) not in self._codes:
            self._codes[stage.name, modules] = stage.code(modules)
        return self._codes[stage.name, modules]

    def forget_outputs(self) -> None:
        """Call it after a build: outputs that depend on the new one have a key now."""
        self._located.clear()


def _name(stage: Stage[Any], part: Part) -> tuple[str, str]:
    return stage.name, json.dumps(part, sort_keys=True)
