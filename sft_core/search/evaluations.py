"""The folders in which a roll-out keeps the weights of its evaluations."""

from __future__ import annotations

from pathlib import Path

FOLDER = "evaluations"


def evaluation_folder(out: Path, evaluation: int) -> Path:
    """The folder of one evaluation's weights. out: the roll-out's output, or where it is built."""
    return out / FOLDER / f"{evaluation:03}"
