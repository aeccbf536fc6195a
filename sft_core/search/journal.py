"""What a roll-out measured, as a file: `curves.json` in its output, which a search reads back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

import numpy as np

from sft_core.search.rollouts import Curves

CURVES = "curves.json"


def write_curves(folder: Path, curves: Curves) -> None:
    plain = {
        "epochs": list(map(float, curves.epochs)),
        "rows": {task: rows.tolist() for task, rows in curves.rows.items()},
    }
    (folder / CURVES).write_text(json.dumps(plain))


def read_curves(file: IO[Any]) -> Curves:
    data = json.load(file)
    return Curves(data["epochs"], {task: np.array(rows) for task, rows in data["rows"].items()})
