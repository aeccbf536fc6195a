"""What a checkpoint holds beside the Trainer's own state: who wrote it, and the sums of the next line in the log.

Invariant: a resumed run writes the log that it would have written without the interruption, speeds aside.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

from sft_core.train.checkpoints import latest

log = logging.getLogger(__name__)
_FILE = "continuation.json"
_FIXED_RANKS = ("zero2", "zero3")  # DeepSpeed stores a rank's share of the optimizer, and reads it by that rank alone


@dataclasses.dataclass(frozen=True)
class Continuation:
    """losses, sums: by rank, since the log's last line, which was at step `logged`: the Trainer's own running sum (of a
    loss that each rank scales by their number), and LossBySource's. packs_a_forward: another number of them rounds
    otherwise."""

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
        """(loss, sums) that a rank goes on from; on another number of ranks their total is the same."""
        mine = range(rank, self.num_ranks, num_ranks)
        loss = sum(self.losses[old] for old in mine) * (num_ranks / self.num_ranks)
        num_sources = len(self.sums[0][0])
        return loss, [[sum(self.sums[old][of][i] for old in mine) for i in range(num_sources)] for of in (0, 1)]


def resumable(folder: Path, strategy: str, num_ranks: int) -> Path | None:
    """The newest whole checkpoint. Raises ValueError where it was written in a way that cannot be gone on with here.

    Under ddp the Trainer would pass over DeepSpeed's optimizer and schedule without a word, and begin with new ones.
    """
    checkpoint = latest(folder)
    if checkpoint is None:
        return None
    written = Continuation.read(checkpoint)
    how = f"{checkpoint.name} was written under {written.strategy} by {_ranks(written.num_ranks)}"
    as_written = f"runtime.distributed: {written.strategy}"
    if written.strategy in _FIXED_RANKS:
        as_written += f" and {_ranks(written.num_ranks)} (runtime.num_processes)"
    advice = f"Go on with {as_written}, or remove {folder} to train from the start"
    if written.strategy != strategy:
        raise ValueError(f"runtime.distributed: found {strategy}, and {how}; each keeps an optimizer its way. {advice}")
    if strategy in _FIXED_RANKS and written.num_ranks != num_ranks:
        raise ValueError(
            f"runtime.num_processes: found {_ranks(num_ranks)}, and {how}; DeepSpeed goes on with as many. {advice}"
        )
    log.info("resume checkpoint=%s", checkpoint.name)
    return checkpoint


def _ranks(number: int) -> str:
    return f"{number} rank{'s' if number != 1 else ''}"
