"""What a roll-out measured and what that took, as a file: `curves.json` in its output, which a search reads back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import IO, Any

import numpy as np

from sft_core.search.rollouts import Curves

CURVES = "curves.json"


@dataclasses.dataclass(frozen=True)
class Cost:
    """training_flops, evaluation_flops: by the estimate of schedule.training_flops; a forward pass is a third of both.

    most_kept: evaluations whose weights were on the disk at once.
    """

    training_flops: float
    evaluation_flops: float
    most_kept: int


def write_journal(folder: Path, curves: Curves, cost: Cost) -> None:
    plain = {
        "epochs": list(map(float, curves.epochs)),
        "rows": {task: rows.tolist() for task, rows in curves.rows.items()},
        "cost": dataclasses.asdict(cost),
    }
    (folder / CURVES).write_text(json.dumps(plain))


def read_journal(file: IO[Any]) -> tuple[Curves, Cost]:
    data = json.load(file)
    rows = {task: np.array(rows) for task, rows in data["rows"].items()}
    return Curves(data["epochs"], rows), Cost(**data["cost"])
