"""The whole campaign: `python -m tests.campaign`. It ends with one table, and with 1 where a promise is broken.

Killed and started again, it goes on: what came out is in FOLDER/results.jsonl. A folder is of one state of the code.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click

from tests.campaign import bad_inputs, flips, full_disk, kills, machines
from tests.campaign.pipeline import files_of, recipe

HEADER = ("fault", "done", "promise", "outcome", "kept")


class Part(NamedTuple):
    """A kind of fault. number: of faults; a case may have several, as a run has that is killed until it ends.

    cases(seed, number): makes them. kind: of a case. module: has as_row and is_kept.
    """

    name: str
    fault: str
    number: int
    cases: Callable[[int, int], Iterator[Any]]
    kind: Callable[..., Any]
    module: Any

    def faults_of(self, case: Any) -> int:
        return case.kills if isinstance(case, kills.Life) else 1


class Results:
    """Lines of a file: a part's name, and a case of it."""

    def __init__(self, path: Path):
        self._path = path

    def of(self, part: Part) -> list[Any]:
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        cases = [json.loads(line) for line in lines]
        return [part.kind(**case["case"]) for case in cases if case["part"] == part.name]

    def add(self, part: Part, case: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"part": part.name, "case": case._asdict()}) + "\n")


@click.command()
@click.option("--seed", default=0, show_default=True)
@click.option("--kills", "num_kills", default=100, show_default=True, help="Of runs that are started again.")
@click.option("--flow-kills", "num_flow_kills", default=20, show_default=True, help="Of flows, which are resumed.")
@click.option("--flips", "num_flips", default=500, show_default=True)
@click.option("--disks", "num_disks", default=8, show_default=True)
@click.option("--runs-in-turn", "num_turns", default=4, show_default=True, help="Runs of two machines on one bucket.")
@click.option("--bad-inputs", "num_bad", default=200, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("build/campaign"), show_default=True)
def main(
    seed: int,
    num_kills: int,
    num_flow_kills: int,
    num_flips: int,
    num_disks: int,
    num_turns: int,
    num_bad: int,
    folder: Path,
) -> None:
    """Kills, flipped bits, full disks, two machines in turn, and bad input: what becomes of a run.

    \b
    Examples: python -m tests.campaign
              python -m tests.campaign --seed 7 --kills 10 --flow-kills 0 --flips 60 --disks 2 --folder /tmp/seven
    """
    folder = folder.resolve()
    clean = folder / "clean" / "store"
    if not (folder / "clean" / "whole").exists():
        shutil.rmtree(folder, ignore_errors=True)  # results of another store's files
        kills.undisturbed(folder / "clean")
        (folder / "clean" / "whole").touch()
    expected = files_of(clean)
    killed = functools.partial(kills.lives, expected=expected)
    parts = [
        Part(
            "bad inputs", "bad input", num_bad,
            lambda seed, n: bad_inputs.bad_inputs(seed, n, folder), bad_inputs.Answer, bad_inputs,
        ),
        Part(
            "flips", "a flipped bit", num_flips,
            lambda seed, n: flips.flips(seed, n, recipe(str(clean)), folder / "flips"), flips.Flip, flips,
        ),
        Part(
            "kills", "SIGKILL, then started again", num_kills,
            lambda seed, n: killed(seed, n, folder / "kills"), kills.Life, kills,
        ),
        Part(
            "flow kills", "SIGKILL of a flow, then `sft resume`", num_flow_kills,
            lambda seed, n: killed(seed, n, folder / "flow-kills", by_flow=True), kills.Life, kills,
        ),
        Part(
            "full disks", "a full disk", num_disks if full_disk.can_mount() else 0,
            lambda seed, n: full_disk.full_disks(seed, n, folder, expected), full_disk.Full, full_disk,
        ),
        Part(
            "machines", "two machines in turn on one bucket", num_turns,
            lambda seed, n: machines.turns(seed, n, folder / "machines", expected), machines.Turns, machines,
        ),
    ]  # fmt: skip
    if not full_disk.can_mount():
        click.echo("full disks are left out: this process may not mount a file system", err=True)
    rows = [row for part in parts if (row := _row(part, seed, Results(folder / "results.jsonl")))]
    click.echo("| " + " | ".join(HEADER) + " |\n|" + "-|" * len(HEADER))
    for row in rows:
        click.echo("| " + " | ".join(row) + " |")
    sys.exit(0 if all(row[-1] == "yes" for row in rows) else 1)


def _row(part: Part, seed: int, results: Results) -> tuple[str, ...] | None:
    started, found = time.monotonic(), results.of(part)
    missing = part.number - sum(map(part.faults_of, found))
    for case in part.cases(seed + len(found), missing) if missing > 0 else ():
        results.add(part, case)
        found.append(case)
        values = ", ".join(f"{name}={str(value)[:60]}" for name, value in case._asdict().items())
        click.echo(f"{time.monotonic() - started:6.0f} s  {part.name}: {values}", err=True)
    if not found:
        return None
    return (part.fault, *part.module.as_row(found), "yes" if part.module.is_kept(found) else "NO")


if __name__ == "__main__":
    if full_disk.can_mount() and not full_disk.is_in_own_namespace():
        full_disk.in_own_namespace()
    main()
