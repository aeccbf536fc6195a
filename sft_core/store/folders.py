"""Folders: where outputs, unfinished work and locks lie below the root of a store, on this machine.

<root>/<stage>/<key>/         an output; manifest.json is in it when the one rename makes it visible
<root>/.partial/<stage>-<key> what a build works in; a resumable stage finds it again
<root>/.fetching/...          what a download works in        <root>/.manifests/...  manifests read from a URL
<root>/.locks/...             one file for each output that was built or removed
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from sft_core.store.digests import sync
from sft_core.store.manifest import MANIFEST
from sft_core.store.ref import Ref

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The folder in which this machine keeps copies. SFT_CACHE moves it; no identity depends on it."""
    return Path(os.environ.get("SFT_CACHE") or "~/.cache/sft-flow").expanduser()


class Folders:
    """The paths below one root, and the moves between them."""

    def __init__(self, root: Path):
        self.root = root

    def output(self, ref: Ref) -> Path:
        return self.root / ref.stage / ref.key

    def manifest(self, ref: Ref) -> Path:
        return self.output(ref) / MANIFEST

    def manifest_copy(self, ref: Ref) -> Path:
        """The local copy of the manifest of an output behind a URL."""
        return self.root / ".manifests" / f"{_name(ref)}.json"

    def scratch(self, ref: Ref) -> Path:
        """The folder in which a build works. For a resumable stage it stays until the output is whole."""
        return self.root / ".partial" / _name(ref)

    def empty_fetching(self, ref: Ref) -> Path:
        """An empty folder for a download. No reader sees it before it is renamed."""
        folder = self.root / ".fetching" / _name(ref)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def is_here(self, ref: Ref) -> bool:
        """Whether the output can be read without a download."""
        return self.manifest(ref).is_file()

    def put_in_place(self, folder: Path, ref: Ref) -> None:
        """Makes a whole folder visible as the output, by one rename."""
        shutil.rmtree(self.output(ref), ignore_errors=True)  # files of a killed removal would stop the rename
        self.output(ref).parent.mkdir(parents=True, exist_ok=True)
        folder.rename(self.output(ref))
        sync([self.output(ref).parent])

    def remove(self, ref: Ref, *, missing_ok: bool = False) -> None:
        """Removes the output and the copy of its manifest. Raises FileNotFoundError when the output is not here."""
        if not missing_ok or self.is_here(ref):
            self.manifest(ref).unlink()  # first: the rest of a killed removal must not be an output
            shutil.rmtree(self.output(ref))
        self.manifest_copy(ref).unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, ref: Ref) -> Iterator[None]:
        """Waits until no other process builds, downloads or removes the output."""
        lock = self._lock(_name(ref))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("stage=%s key=%s status=waiting another process builds it", ref.stage, ref.key)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def abandoned(self) -> list[Path]:
        """Folders of builds and downloads that no process continues."""
        folders = sorted([*self.root.glob(".partial/*"), *self.root.glob(".fetching/*")])
        return [folder for folder in folders if not self._is_locked(folder.name)]

    def _is_locked(self, name: str) -> bool:
        lock = self._lock(name)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        return False

    def _lock(self, name: str) -> FileLock:
        return FileLock(self.root / ".locks" / f"{name}.lock")


def remove_matching(folder: Path, patterns: Sequence[str]) -> None:
    """Removes what is in a folder under the names that the patterns match."""
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _name(ref: Ref) -> str:
    return f"{ref.stage}-{ref.key}"
