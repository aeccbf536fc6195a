"""Watches a roll-out: its curves, the weights that the search may still need, and when it may end."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sft_core.search.evaluations import FOLDER, evaluation_folder
from sft_core.search.rollouts import Curves, Search
from sft_core.train.row_losses import RowLosses


class RolloutWatch:
    """Scores each selection row by minus its loss per trained token, or by its answer where answers are scored.

    out: the folder in which the roll-out is built. tasks: all tasks of the search; rows of other sources have no score.
    """

    def __init__(self, search: Search, tasks: list[str], sources: list[str], out: Path, steps_per_epoch: int):
        self._search, self._tasks, self._sources = search, tasks, sources
        self.steps_per_epoch, self._out = steps_per_epoch, out
        self._steps: list[int] = []
        self._scores: list[dict[str, list[float]]] = []
        self._kept: set[int] = set()
        self.most_kept = 0  # the most evaluations whose weights were on the disk at once

    @property
    def curves(self) -> Curves:
        epochs = [step / self.steps_per_epoch for step in self._steps]
        return Curves(epochs, {task: np.array([scores[task] for scores in self._scores]) for task in self._tasks})

    @property
    def is_decided(self) -> bool:
        return self._search.is_decided(self.curves)

    def begin(self, past: Sequence[Mapping[str, Any]]) -> None:
        self._steps = [event["step"] for event in past]
        self._scores = [event["scores"] for event in past]
        self._kept = set(past[-1]["kept"]) if past else set()
        self.most_kept = max((len(event["kept"]) for event in past), default=0)

    def see(self, step: int, losses: RowLosses, save: Callable[[Path], None]) -> dict[str, object]:
        by_row = -losses.by_row if losses.answers is None else losses.answers
        is_scored = ~np.isnan(by_row)
        rows_of = {task: (losses.source == self._sources.index(task)) & is_scored for task in self._tasks}
        self._steps.append(step)
        self._scores.append({task: by_row[rows].tolist() for task, rows in rows_of.items()})
        evaluation, wanted = len(self._steps) - 1, self._search.wanted(self.curves)
        if evaluation in wanted:
            folder = evaluation_folder(self._out, evaluation)
            folder.parent.mkdir(exist_ok=True)
            save(folder)
        self._kept = (self._kept | {evaluation}) & wanted
        self.most_kept = max(self.most_kept, len(self._kept))
        return {"evaluation": evaluation, "scores": self._scores[-1], "kept": sorted(self._kept)}

    @property
    def checkpoint_bytes(self) -> int:
        """The size of one evaluation's weights; 0 when none are kept."""
        folders = sorted((self._out / FOLDER).glob("*"))
        return sum(path.stat().st_size for path in folders[0].rglob("*") if path.is_file()) if folders else 0

    def saved(self) -> None:
        self.keep_only(self._kept)

    def keep_only(self, evaluations: set[int]) -> None:
        """Removes the weights of all other evaluations."""
        wanted = {evaluation_folder(self._out, evaluation).name for evaluation in evaluations}
        for folder in (self._out / FOLDER).iterdir():
            if folder.name not in wanted:
                shutil.rmtree(folder)
