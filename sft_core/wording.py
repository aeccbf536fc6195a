"""Pieces of messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def short(value: Any) -> str:
    """The value as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def nearest(name: str, known: list[str]) -> str:
    """The end of a message about a name that is not known."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def alternatives(names: Iterable[str]) -> str:
    """
    >>> alternatives(["ddp"]), alternatives(["ddp", "fsdp2", "zero2"])
    ('ddp', 'ddp, fsdp2 or zero2')
    """
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def counted(number: int, thing: str) -> str:
    """
    >>> counted(1, "roll-out"), counted(2, "roll-out")
    ('1 roll-out', '2 roll-outs')
    """
    return f"{number} {thing}{'' if number == 1 else 's'}"
