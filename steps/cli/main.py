"""The `sft` command: checks a recipe before a run, and shows the results of runs."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from sft_core.report.shown import shown
from steps.cli import after_a_run, before_a_run
from steps.cli.store import store
from steps.colour import print_fault


class Commands(click.Group):
    """A user's mistake is one clear message, not a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader has read enough, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at the end fails again
            ctx.exit(0)
        except (ValueError, OSError) as error:
            if os.environ.get("SFT_TRACEBACK"):
                raise
            notes = "".join(f"\n({note})" for note in getattr(error, "__notes__", ()))
            if hasattr(error, "pieces") and print_fault(error):
                ctx.exit(1)
            raise click.ClickException(shown(f"{error}{notes}")) from None


@click.group(cls=Commands)
def main() -> None:
    """From raw chat data to a scored checkpoint.

    A run itself is `python flows/sft_flow.py --config recipe RECIPE run`.
    """


for command in (*before_a_run.COMMANDS, *after_a_run.COMMANDS, store):
    main.add_command(command)


if __name__ == "__main__":
    main()
