"""One rank of a roll-out: `python -m torch.distributed.run ... -m sft_core.search.main JOB.json`.

Trains as sft_core.train.main does, shows a search what it measures, and writes curves.json and the weights of those
evaluations that the search asks for.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

from sft_core.search.journal import CURVES, Cost, read_journal, write_journal
from sft_core.search.rollouts import Search, replay
from sft_core.search.strategies import make_search
from sft_core.search.watch import RolloutWatch
from sft_core.train.main import main, trained


def roll_out(job: dict[str, Any], out: Path) -> None:
    """Trains, and writes what the search asks for."""
    tasks, search = job["rollout"]["tasks"], search_of(job["rollout"])
    trainer = trained(job, out, functools.partial(RolloutWatch, search, tasks, job["sources"], out))
    if trainer.accelerator.is_main_process:
        assert trainer.selection is not None and isinstance(trainer.selection.watch, RolloutWatch)
        watch = trainer.selection.watch
        watch.keep_only(search.kept(watch.curves))
        training, evaluation = trainer.flops()
        write_journal(out, watch.curves, Cost(training, evaluation, watch.most_kept))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def search_of(rollout: dict[str, Any]) -> Search:
    """The search as it stands before this roll-out."""
    search = make_search(rollout["search"], rollout["tasks"], rollout["sizes"])
    journal = []
    for folder in rollout["before"]:
        with (Path(folder) / CURVES).open() as file:
            journal.append(read_journal(file)[0])
    replay(search, journal)
    assert search.propose() is not None
    return search


if __name__ == "__main__":
    main(Path(sys.argv[1]), roll_out)
