"""Interfaces that training calls: Sampler draws its packs, Watch follows its losses, AnswerScorer scores its answers.

sft_core/search and sft_core/evaluate implement them; training imports no implementation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sft_core.train.row_losses import RowLosses

if TYPE_CHECKING:
    import torch

Pack = np.ndarray  # numbers of the plan's documents, int64, shape (documents,)
Block = list[list[Pack]]  # the global batch of each of some optimizer steps


class Sampler(Protocol):
    """Draws the packs to train on, block by block, and learns from measurements between two blocks.

    Its methods are called in turn: next_block, probes, learn, next_block, ... The same measurements must lead to the
    same blocks: a resumed training replays its sampler.
    """

    def next_block(self) -> Block | None:
        """The packs of the next optimizer steps; None if training is over."""

    def probes(self) -> list[Pack] | None:
        """The packs on which to measure a step's gain before the next block; None: measure every document's loss."""

    def learn(self, measured: np.ndarray) -> None:
        """Takes in gains, shape (probes,), or losses per trained token, shape (documents,)."""

    def shares(self) -> dict[str, float]:
        """The share of each task among the packs of the next block."""


class Watch(Protocol):
    """Follows the selection losses during training, saves weights, and may end the training."""

    def begin(self, past: Sequence[Mapping[str, Any]]) -> None:
        """past: the events that `see` returned so far, up to the checkpoint that training resumes from."""

    def see(self, step: int, losses: RowLosses, save: Callable[[Path], None]) -> dict[str, object]:
        """The event to log for an evaluation. save: writes the weights to a folder; all ranks call it together."""

    def saved(self) -> None:
        """A checkpoint is complete: training will not resume from an earlier step. Called on rank 0 only."""

    @property
    def is_decided(self) -> bool:
        """Whether the training can end."""


class AnswerScorer(Protocol):
    """Scores what the model answers to the selection rows."""

    def ready(self, model: Any) -> contextlib.AbstractContextManager[None]:
        """Reads the questions; `score` is called inside this context."""

    def score(
        self,
        model: Any,
        losses: RowLosses,
        *,
        rank: int,
        num_ranks: int,
        sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[np.ndarray, float]:
        """The scores of the rows, shape (rows,), NaN for rows without a question; and the FLOPs of answering.

        losses: of the same weights, with num_correct. Each rank answers some of the rows; all ranks get the result.
        """
