"""Outputs that hold files of another one, without taking room for them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def link_files(source: Path, target: Path, *, without: str | None = None) -> tuple[int, int]:
    """The files below `source`, also below `target`: hard links, or copies where there are none. (links, files)

    Nothing may write to either afterwards; a file called `without`, which the new output writes itself, is left out.
    """
    files = sorted(path for path in source.rglob("*") if path.is_file() and path.name != without)
    num_linked = 0
    target.mkdir(parents=True)
    for path in files:
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, place)
            num_linked += 1
        except OSError:  # another device, or a file system without links
            shutil.copyfile(path, place)
    return num_linked, len(files)
