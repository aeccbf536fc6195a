"""One rank of a roll-out: `python -m torch.distributed.run ... -m sft_core.search.main JOB.json`.

Trains as sft_core.train.main does, shows a search what it measures, and writes curves.json and the weights of those
evaluations that the search asks for.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sft_core.search.journal import CURVES, read_curves, write_curves
from sft_core.search.rollouts import Search, replay
from sft_core.search.strategies import make_search
from sft_core.search.watch import RolloutWatch
from sft_core.train.main import main, trained


def roll_out(job: dict[str, Any], out: Path) -> None:
    rollout = job["rollout"]
    tasks, search = rollout["tasks"], search_of(rollout)
    watches: list[RolloutWatch] = []

    def watch(steps_per_epoch: int) -> RolloutWatch:
        watches.append(RolloutWatch(search, tasks, job["sources"], steps_per_epoch, out))
        return watches[-1]

    trainer = trained(job, out, watch)
    if trainer.accelerator.is_main_process:
        curves = watches[-1].curves
        watches[-1].keep_only(search.kept(curves))
        write_curves(out, curves)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def search_of(rollout: dict[str, Any]) -> Search:
    """The search as it stands before this roll-out."""
    search = make_search(rollout["search"], rollout["tasks"], rollout["sizes"])
    journal = []
    for folder in rollout["before"]:
        with (Path(folder) / CURVES).open() as file:
            journal.append(read_curves(file))
    replay(search, journal)
    assert search.propose() is not None
    return search


if __name__ == "__main__":
    main(Path(sys.argv[1]), roll_out)
