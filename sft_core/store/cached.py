"""A store behind a URL: its outputs are built and read in folders of this machine."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sft_core.store.digests import DIGESTS, is_whole
from sft_core.store.folders import Folders
from sft_core.store.manifest import (
    MANIFEST,
    CorruptOutput,
    Manifest,
    check_files,
    data_digest,
    digest_in,
    parse_manifest,
    read_manifest,
)
from sft_core.store.ref import Ref

if TYPE_CHECKING:
    from sft_core.store.remote import Remote

log = logging.getLogger(__name__)


class Cached:
    """Moves outputs between a URL and their copies on this machine."""

    def __init__(self, remote: Remote, folders: Folders):
        self.remote = remote
        self.folders = folders

    def publish(self, ref: Ref) -> None:
        """Uploads an output of this machine. When another machine was first, its output replaces the local one."""
        folder, path, started = self.folders.output(ref), self.folders.manifest(ref), time.monotonic()
        manifest = read_manifest(ref, path, path.stat().st_mtime_ns)
        data = data_digest(manifest)
        try:
            won = self.remote.publish(ref, folder, manifest["files"], data)
        except BaseException as error:
            error.add_note(f"while uploading {ref}; it is whole in {folder}, and the next run uploads it")
            raise
        status = "uploaded" if won else "lost another machine was first; its output is read"
        log.info("stage=%s key=%s seconds=%.1f status=%s", ref.stage, ref.key, time.monotonic() - started, status)
        if not won:
            self.folders.remove(ref)
            self.remote.forget()
            if data_digest(self.fetch_manifest(ref)) != data:
                self.remote.remove_data(ref, data)

    def download(self, ref: Ref) -> None:
        """Makes a local copy. Raises CorruptOutput, and leaves no copy, where files are damaged or missing."""
        with self.folders.lock(ref):
            if self.folders.is_here(ref):
                return
            started, folder = time.monotonic(), self.folders.empty_fetching(ref)
            try:
                manifest = self.fetch_manifest(ref)
                self.remote.download(ref, folder, manifest["files"], data_digest(manifest))
                check_files(ref, manifest, manifest["files"], functools.partial(digest_in, folder), self.remedy(ref))
                shutil.copyfile(self.folders.manifest_copy(ref), folder / MANIFEST)
                self.folders.put_in_place(folder, ref)
            except FileNotFoundError as error:
                raise CorruptOutput(f"{ref}: {error}. {self.remedy(ref)}") from None
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        num_bytes, seconds = sum(entry["bytes"] for entry in manifest["files"].values()), time.monotonic() - started
        log.info("stage=%s key=%s seconds=%.1f status=downloaded bytes=%d", ref.stage, ref.key, seconds, num_bytes)

    def verify(self, ref: Ref) -> None:
        """Raises CorruptOutput for a missing or altered file behind the URL, and for an altered manifest."""
        manifest = self.fetch_manifest(ref)
        digest_of = functools.partial(self.remote.digest_of, ref, data_digest(manifest))
        check_files(ref, manifest, manifest["files"], digest_of, self.remedy(ref))

    def fetch_kept(self, ref: Ref) -> None:
        """Adds the folders that an unfinished build on another machine has kept, where those are the newer ones."""
        scratch = self.folders.scratch(ref)
        kept = sorted(self.remote.kept(scratch.name), key=_age)
        places = {(scratch / name).parent for name in kept}
        here = [path.parent for path in scratch.rglob(DIGESTS) if path.parent.parent in places]
        if not kept or any(_age(folder.name) >= _age(kept[-1]) and is_whole(folder) for folder in here):
            return
        fetched = self.folders.empty_fetching(ref)
        self.remote.fetch_kept(scratch.name, fetched)
        # The newest last: it is what a build that was killed here looks at.
        for name in [name for name in kept if (fetched / name).is_dir()]:
            shutil.rmtree(scratch / name, ignore_errors=True)
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (fetched / name).rename(scratch / name)
        shutil.rmtree(fetched)

    def manifest_path(self, ref: Ref) -> Path:
        """A file on this machine with the manifest, which is downloaded at the first call."""
        path = self.folders.manifest_copy(ref)
        if not path.is_file():
            self.fetch_manifest(ref)
        return path

    def fetch_manifest(self, ref: Ref) -> Manifest:
        """Downloads the manifest and keeps a copy. Raises CorruptOutput when it is not what was written."""
        text, path = self.remote.read(ref), self.folders.manifest_copy(ref)
        try:
            manifest = parse_manifest(ref, text)  # before copying: a damaged copy would outlive the output's removal
        except CorruptOutput as error:
            raise CorruptOutput(f"{error}. {self.remedy(ref)}") from None
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
        return manifest

    def remedy(self, ref: Ref) -> str:
        """What to do about a damaged output behind the URL; the end of a message."""
        return f"Remove it with `sft store gc {ref} --delete --store {self.remote.url}`; the next run builds it again."


def _age(name: str) -> int:
    """The number at the end of a kept folder's name."""
    return int(name.rpartition("-")[2])
