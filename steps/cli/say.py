"""How `sft` writes: nothing from data moves the cursor, colours the terminal, or turns the writing direction."""

from __future__ import annotations

from typing import Any

import click

from sft_core.report.shown import shown


def say(text: str = "", *, err: bool = False, nl: bool = True, **style: Any) -> None:
    """click.echo of the text as `shown` has it, in a style of click."""
    text = shown(text)
    click.echo(click.style(text, **style) if style else text, err=err, nl=nl)


def say_painted(text: str) -> None:
    """click.echo of a text that holds colours of ours, and of data what is shown already."""
    click.echo(text)
