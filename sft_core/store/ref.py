"""Ref: the address of an output."""

from __future__ import annotations

from typing import NamedTuple


class Ref(NamedTuple):
    """A stage's name and a key: a small plain value, which stays true when the store moves."""

    stage: str
    key: str

    def __str__(self) -> str:
        return f"{self.stage}/{self.key}"
