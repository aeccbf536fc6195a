"""The whole campaign: `python -m tests.campaign`. It ends with one table, and with 1 where a promise is broken.

Killed and started again, it goes on: what came out is in FOLDER/results.jsonl.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from tests.campaign import bad_inputs, flips, full_disk, kills, machines
from tests.campaign.pipeline import files_of, recipe

HEADER = ("fault", "promise", "outcome")


class Results:
    """Lines of a file: a part of the campaign, and a case of it."""

    def __init__(self, path: Path):
        self._path = path

    def of(self, part: str, kind: Callable[..., Any]) -> list[Any]:
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        cases = [json.loads(line) for line in lines]
        return [kind(**case["case"]) for case in cases if case["part"] == part]

    def add(self, part: str, case: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"part": part, "case": case._asdict()}) + "\n")


@click.command()
@click.option("--seed", default=0, show_default=True)
@click.option("--kills", "num_kills", default=100, show_default=True)
@click.option("--flips", "num_flips", default=500, show_default=True)
@click.option("--disks", "num_disks", default=8, show_default=True)
@click.option("--runs-in-turn", "num_turns", default=4, show_default=True, help="Runs of two machines on one bucket.")
@click.option("--bad-inputs", "num_bad", default=200, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("build/campaign"), show_default=True)
def main(seed: int, num_kills: int, num_flips: int, num_disks: int, num_turns: int, num_bad: int, folder: Path) -> None:
    """Kills, flipped bits, full disks, two machines in turn, and bad input: what becomes of a run.

    \b
    Examples: python -m tests.campaign
              python -m tests.campaign --seed 7 --kills 10 --flips 60 --disks 2 --runs-in-turn 1 --bad-inputs 60
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results, started = Results(folder / "results.jsonl"), time.monotonic()
    clean = folder / "clean" / "store"
    if not (folder / "clean" / "whole").exists():
        shutil.rmtree(folder / "clean", ignore_errors=True)
        kills.undisturbed(folder / "clean")
        (folder / "clean" / "whole").touch()
    expected = files_of(clean)
    rows = []

    def part(
        module: Any,
        kind: Callable[..., Any],
        number: int,
        cases: Callable[[int, int], Iterator[Any]],
        weight: Callable[[Any], int],
    ) -> None:
        name = module.__name__.rpartition(".")[2]
        found = results.of(name, kind)
        missing = number - sum(map(weight, found))
        for case in cases(seed + len(found), missing) if missing > 0 else ():
            results.add(name, case)
            found.append(case)
            click.echo(f"{time.monotonic() - started:6.0f} s  {name}  {_short(case)}", err=True)
        if found:
            rows.append((module.is_kept(found), *module.as_row(found)))

    def once(case: Any) -> int:
        return 1

    part(bad_inputs, bad_inputs.Answer, num_bad, lambda seed, n: bad_inputs.bad_inputs(seed, n, folder), once)
    part(flips, flips.Flip, num_flips, lambda seed, n: flips.flips(seed, n, recipe(str(clean)), folder / "flips"), once)
    part(
        kills,
        kills.Life,
        num_kills,
        lambda seed, n: kills.lives(seed, n, folder / "kills", expected),
        lambda life: life.kills,
    )
    if full_disk.can_mount():
        part(
            full_disk, full_disk.Full, num_disks, lambda seed, n: full_disk.full_disks(seed, n, folder, expected), once
        )
    else:
        click.echo("full disks are left out: this process may not mount a file system", err=True)
    part(
        machines,
        machines.Turns,
        num_turns,
        lambda seed, n: machines.turns(seed, n, folder / "machines", expected),
        once,
    )

    click.echo("| " + " | ".join(HEADER) + " | kept |\n|" + "-|" * (len(HEADER) + 1))
    for is_kept, *row in rows:
        click.echo("| " + " | ".join(row) + f" | {'yes' if is_kept else 'NO'} |")
    sys.exit(0 if all(is_kept for is_kept, *_ in rows) else 1)


def _short(case: Any) -> str:
    return ", ".join(f"{name}={str(value)[:60]}" for name, value in case._asdict().items())


if __name__ == "__main__":
    if full_disk.can_mount() and not full_disk.is_in_own_namespace():
        full_disk.in_own_namespace()
    main()
