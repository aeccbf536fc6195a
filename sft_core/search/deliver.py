"""The weights that a search ends with, as a checkpoint of its own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_core.train.launch import evaluation_folder

if TYPE_CHECKING:
    from sft_core.store import Build


def build_delivered(build: Build, *, evaluation: int) -> dict[str, Any]:
    """Writes model/: the files of an evaluation of a roll-out, linked where the file system allows."""
    source = evaluation_folder(build.inputs["trained"], evaluation)
    shutil.copytree(source, build.out / "model", copy_function=_link)
    return {"evaluation": evaluation}


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, Path(target))
