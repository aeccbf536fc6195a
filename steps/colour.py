"""Colours: trained text green, masked text dim, control tokens reversed; red flags of scores bold red."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

# Import Rich only where something is painted: at the top, every task of a flow would wait for it.
if TYPE_CHECKING:
    from rich.text import Text

    from sft_core.data.proof.decoded import Piece

TRAINED, MASKED, CONTROL, WARNING = "green", "dim", "reverse", "bold red"


def painted(pieces: Iterable[Piece]) -> Text:
    from rich.text import Text

    text = Text()
    for piece in pieces:
        style = TRAINED if piece.is_trained else MASKED
        text.append(piece.text, f"{style} {CONTROL}" if piece.is_control else style)
    return text


def legend() -> Text:
    from rich.text import Text

    return Text.assemble(("trained", TRAINED), " ", ("masked", MASKED), " ", ("control token", CONTROL))


def print_fault(error: Exception) -> bool:
    """Prints the row of a failed mask proof to a terminal. Returns False without a terminal, or for another error."""
    from rich.console import Console

    pieces: list[Piece] = getattr(error, "pieces", [])
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not pieces or not console.is_terminal:
        return False
    console.print(f"\n{getattr(error, 'fault', error)}", markup=False)
    console.print(legend(), end="\n\n")
    console.print(painted(pieces))
    for note in getattr(error, "__notes__", ()):
        console.print(note, markup=False)
    return True


def last_column_red(table: str, name: str) -> str:
    """The text table with its last column in red, "-" excepted; without a terminal, the table unchanged."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        return table
    header, rule, *rows = table.split("\n")
    column = header.rindex(name)
    lines = [Text.assemble(row[:column], (row[column:], "" if row[column:] == "-" else WARNING)) for row in rows]
    with console.capture() as captured:
        console.print(Text("\n").join([Text(header), Text(rule), *lines]), end="")
    return captured.get()


@contextlib.contextmanager
def faults_in_colour() -> Iterator[None]:
    """Prints the row of a mask proof that fails in the body; the error propagates, with the row in plain text."""
    try:
        yield
    except ValueError as error:
        if hasattr(error, "pieces"):
            print_fault(error)
        raise
