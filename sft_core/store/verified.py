"""Verified: the files that this process has found whole, so that it reads each only once to verify it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from sft_core.store.manifest import Manifest, check_files, digest_in
from sft_core.store.ref import Ref

SHOWN_BYTES = 8 * 2**30  # fewer bytes take about a second and show no bar


class Verified:
    def __init__(self) -> None:
        self._states: set[tuple[Path, int, int, int]] = set()

    def check(self, ref: Ref, manifest: Manifest, folder: Path, names: Sequence[str], remedy: str) -> None:
        """Verifies those files of an output's folder that changed since it did last.

        Raises CorruptOutput, with the remedy, for the first missing or altered one.
        """
        num_bytes = sum(manifest["files"][name]["bytes"] for name in names)
        hidden = True if num_bytes < SHOWN_BYTES else None
        with tqdm(total=num_bytes, desc=f"verify {ref}", unit="B", unit_scale=True, disable=hidden) as bar:
            for name in names:
                state = _state(folder / name)
                if state is None or state not in self._states:
                    check_files(ref, manifest, [name], functools.partial(digest_in, folder), remedy)
                    if state is not None:
                        self._states.add(state)
                bar.update(manifest["files"][name]["bytes"])


def _state(path: Path) -> tuple[Path, int, int, int] | None:
    """What changes when somebody writes to the file; None for a missing one."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return None
    return path, facts.st_ino, facts.st_mtime_ns, facts.st_size
