"""Colours: trained text green, masked text dim, control tokens reversed; red flags of scores bold red."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from sft_core.report.shown import show_error

# Import Rich only where something is painted: at the top, every task of a flow would wait for it.
if TYPE_CHECKING:
    from rich.text import Text

    from sft_core.data.proof.decoded import Piece

TRAINED, MASKED, CONTROL, WARNING = "green", "dim", "reverse", "bold red"


def painted(pieces: Iterable[Piece]) -> Text:
    from steps.console import styled

    styles = {True: TRAINED, False: MASKED}
    return styled(*((piece.text, f"{styles[piece.is_trained]}{f' {CONTROL}' * piece.is_control}") for piece in pieces))


def legend() -> Text:
    from rich.text import Text

    return Text.assemble(("trained", TRAINED), " ", ("masked", MASKED), " ", ("control token", CONTROL))


def print_fault(error: Exception) -> bool:
    """Prints the row of a failed mask proof to a terminal. Returns False without a terminal, or for another error."""
    from steps.console import TextConsole

    pieces: list[Piece] = getattr(error, "pieces", [])
    console = TextConsole(stderr=True, soft_wrap=True)
    if not pieces or not console.is_terminal:
        return False
    console.print(f"\n{getattr(error, 'fault', error)}")
    console.print(legend(), end="\n\n")
    console.print(painted(pieces))
    for note in getattr(error, "__notes__", ()):
        console.print(note)
    return True


def last_column_red(table: str, name: str) -> str:
    """The text table with its last column in red, "-" excepted; without a terminal, the table unchanged."""
    from rich.text import Text

    from steps.console import TextConsole

    console = TextConsole(soft_wrap=True)
    if not console.is_terminal:
        return table
    header, rule, *rows = table.split("\n")
    column = header.rindex(name)
    lines = [Text.assemble(row[:column], (row[column:], "" if row[column:] == "-" else WARNING)) for row in rows]
    with console.capture() as captured:
        console.print(Text("\n").join([Text(header), Text(rule), *lines]), end="")
    return captured.get()


@contextlib.contextmanager
def errors_as_text() -> Iterator[None]:
    """Lets an error of the body pass with what acts in its text as symbols: Metaflow prints it, and keeps it.

    Prints the row of a mask proof that fails, in colour; the error has the row in plain text.
    """
    try:
        yield
    except Exception as error:
        if hasattr(error, "pieces"):
            print_fault(error)
        show_error(error)
        raise
