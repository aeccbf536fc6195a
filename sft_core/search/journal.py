"""curves.json in a roll-out's output: its curves and their cost. A search reads it back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from sft_core.search.rollouts import Curves

CURVES = "curves.json"


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a roll-out.

    training_flops, evaluation_flops: by flops.training_flops; a forward pass counts as a third. most_kept: evaluations
    whose weights were on the disk at once. checkpoint_bytes: of one evaluation's weights.
    """

    training_flops: float
    evaluation_flops: float
    most_kept: int
    checkpoint_bytes: int


class Drawn(NamedTuple):
    """The shares of tasks with which a sampler draws after `epochs`."""

    epochs: float
    shares: dict[str, float]


class Journal(NamedTuple):
    curves: Curves
    cost: Cost
    drawn: list[Drawn]  # empty for a roll-out with a fixed schedule


def write_journal(folder: Path, journal: Journal) -> None:
    plain = {
        "epochs": list(map(float, journal.curves.epochs)),
        "rows": {task: rows.tolist() for task, rows in journal.curves.rows.items()},
        "cost": dataclasses.asdict(journal.cost),
        "drawn": [drawn._asdict() for drawn in journal.drawn],
    }
    (folder / CURVES).write_text(json.dumps(plain))


def read_journal(file: IO[Any]) -> Journal:
    data = json.load(file)
    rows = {task: np.array(rows) for task, rows in data["rows"].items()}
    drawn = [Drawn(**moment) for moment in data["drawn"]]
    return Journal(Curves(data["epochs"], rows), Cost(**data["cost"]), drawn)
