"""Hard links: an output holds files of another output without a second copy on the disk.

This module is not in the store package: builders import it, so all code that it imports is in their keys.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def link_files(source: Path, target: Path, *, without: str | None = None) -> tuple[int, int]:
    """Links the files below `source` into `target`; where a link fails, copies the file. Returns (links, files).

    Do not write to the files of either folder afterwards. Files called `without` are left out.
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
