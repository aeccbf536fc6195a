"""Pieces of messages."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from typing import Any


def short(value: Any) -> str:
    """The value as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def nearest(name: str, known: Collection[str], *, otherwise: str | None = None) -> str:
    """The end of a message about an unknown name: the known name that is nearest to it.

    otherwise: the end where no name is near; the default lists all known names.
    """
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(sorted(known))}" if otherwise is None else otherwise


def some(names: Sequence[str], most: int = 8) -> str:
    """
    >>> some(["a", "b"]), some(["a", "b", "c"], most=2)
    ('a, b', 'a, b and 1 more')
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


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
