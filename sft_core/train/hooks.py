"""What may take part in a training: who draws its packs, who watches its losses, who scores its answers.

Training calls these and knows no implementation. sft_core/search and sft_core/evaluate implement them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sft_core.train.row_losses import RowLosses

if TYPE_CHECKING:
    import torch

Pack = np.ndarray  # numbers of the plan's documents, int64, shape (documents,)
Block = list[list[Pack]]  # the global batch of each of some optimizer steps


class Sampler(Protocol):
    """Draws what is trained, block by block, and learns from what is measured between two blocks.

    Its methods are called in turn: next_block, probes, learn, next_block, ... The same measurements lead to the same
    blocks, so a resumed training replays its sampler.
    """

    def next_block(self) -> Block | None:
        """The next optimizer steps; None when there is nothing left to train."""

    def probes(self) -> list[Pack] | None:
        """The packs of which one step's gain is measured before the next block; None: every document's loss is."""

    def learn(self, measured: np.ndarray) -> None:
        """Takes in gains, shape (probes,), or losses per trained token, shape (documents,)."""

    def shares(self) -> dict[str, float]:
        """What the next block is drawn from: of each task, its share of what is trained."""


class Watch(Protocol):
    """Looks at the selection losses of a training under way, keeps weights of it, and may end it."""

    def begin(self, past: list[dict[str, Any]]) -> None:
        """past: the events that `see` returned so far, up to the checkpoint that training resumes from."""

    def see(self, step: int, losses: RowLosses, save: Callable[[Path], None]) -> dict[str, Any]:
        """The event to log for an evaluation. save: writes the present weights to a folder, on all ranks together."""

    def saved(self) -> None:
        """A checkpoint is whole: the training will not go back to what was before it. On the first rank only."""

    @property
    def is_decided(self) -> bool:
        """Whether the training can end."""


class AnswerScorer(Protocol):
    """Scores what the model answers to the selection rows."""

    def ready(self, model: Any) -> contextlib.AbstractContextManager[None]:
        """Reads the questions. Scores are asked for inside."""

    def score(
        self,
        model: Any,
        losses: RowLosses,
        *,
        rank: int,
        num_ranks: int,
        sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[np.ndarray, float]:
        """Scores of the rows, shape (rows,), NaN of rows without a question; and the FLOPs that answering took.

        losses: of the same weights, with num_correct. The ranks share the rows; all get the result.
        """
