"""The part of a checkpoint beside the Trainer's state: the ranks that wrote it, and sums for the log's next line.

Invariant: a resumed run writes the log that it would have written without the interruption, speeds aside.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

from sft_core.recipe.rank_strategies import STRATEGIES
from sft_core.train.checkpoints import latest

log = logging.getLogger(__name__)
_FILE = "continuation.json"


@dataclasses.dataclass(frozen=True)
class Continuation:
    """The state with which the ranks of a resumed run begin.

    losses, sums: by rank, since the log's last line, which was at step `logged`. losses: the Trainer's running sum of a
    loss that each rank scales by the number of ranks. sums: LossBySource's. packs_a_forward: a resumed run keeps it,
    because another number of packs in a forward rounds differently.
    """

    strategy: str
    num_ranks: int
    logged: int
    losses: list[float]
    sums: list[list[list[float]]]  # (ranks, 2, sources)
    packs_a_forward: int = 1

    def write(self, checkpoint: Path) -> None:
        (checkpoint / _FILE).write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def read(cls, checkpoint: Path) -> Continuation:
        return cls(**json.loads((checkpoint / _FILE).read_text()))

    def share(self, rank: int, num_ranks: int) -> tuple[float, list[list[float]]]:
        """(loss, sums) from which a rank continues. Their totals over ranks do not depend on the number of ranks."""
        mine = range(rank, self.num_ranks, num_ranks)
        loss = sum(self.losses[old] for old in mine) * (num_ranks / self.num_ranks)
        num_sources = len(self.sums[0][0])
        return loss, [[sum(self.sums[old][of][i] for old in mine) for i in range(num_sources)] for of in (0, 1)]


def resumable(folder: Path, strategy: str, num_ranks: int) -> Path | None:
    """The newest complete checkpoint, if any. Raises ValueError if this strategy or number of ranks cannot resume it.

    Without the check the Trainer under ddp silently starts a new optimizer and schedule: it does not read DeepSpeed's.
    """
    checkpoint = latest(folder)
    if checkpoint is None:
        return None
    written = Continuation.read(checkpoint)
    writer = f"{checkpoint.name} was written under {written.strategy} by {_ranks(written.num_ranks)}"
    as_written = f"runtime.distributed: {written.strategy}"
    if (writers := STRATEGIES.get(written.strategy)) is not None and writers.fixed_ranks:
        as_written += f" and {_ranks(written.num_ranks)} (runtime.num_processes)"
    advice = f"Continue with {as_written}, or remove {folder} to train from the start"
    if written.strategy != strategy:
        raise ValueError(
            f"runtime.distributed: found {strategy}, and {writer}; each saves the optimizer in another format. {advice}"
        )
    if STRATEGIES[strategy].fixed_ranks and written.num_ranks != num_ranks:
        raise ValueError(
            f"runtime.num_processes: found {_ranks(num_ranks)}, and {writer}; {strategy} resumes only with that "
            f"number. {advice}"
        )
    log.info("resume checkpoint=%s", checkpoint.name)
    return checkpoint


def _ranks(number: int) -> str:
    return f"{number} rank{'s' if number != 1 else ''}"
