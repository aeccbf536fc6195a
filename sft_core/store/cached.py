"""A store behind a URL: its outputs are built and read in folders of this machine."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sft_core.store.folders import Folders
from sft_core.store.manifest import MANIFEST, CorruptOutput, Manifest, check, data_digest, digest_in, read_manifest
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
        manifest = read_manifest(path, path.stat().st_mtime_ns)
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
                check(ref, manifest, functools.partial(digest_in, folder), self.remedy(ref))
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
        check(ref, manifest, functools.partial(self.remote.digest_of, ref, data_digest(manifest)), self.remedy(ref))

    def fetch_kept(self, ref: Ref) -> None:
        """Fills an empty scratch folder with the folders that an unfinished build on another machine has kept."""
        scratch = self.folders.scratch(ref)
        if scratch.is_dir() and any(scratch.iterdir()):
            return
        fetched = self.folders.empty_fetching(ref)
        self.remote.fetch_kept(scratch.name, fetched)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.parent.mkdir(parents=True, exist_ok=True)
        fetched.rename(scratch)  # all at once: a build that has some of the folders would never fetch the others

    def manifest_path(self, ref: Ref) -> Path:
        """A file on this machine with the manifest, which is downloaded at the first call."""
        path = self.folders.manifest_copy(ref)
        if not path.is_file():
            self.fetch_manifest(ref)
        return path

    def fetch_manifest(self, ref: Ref) -> Manifest:
        """Downloads the manifest and keeps a copy. Raises CorruptOutput when it cannot be read."""
        text, path = self.remote.read(ref), self.folders.manifest_copy(ref)
        try:
            manifest = json.loads(text)  # parse before copying: an unreadable copy would outlive the output's removal
        except ValueError as error:
            raise CorruptOutput(f"{ref}: {MANIFEST} cannot be read ({error}). {self.remedy(ref)}") from None
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
        return manifest

    def remedy(self, ref: Ref) -> str:
        """What to do about a damaged output behind the URL; the end of a message."""
        return f"Remove it with `sft store gc {ref} --delete --store {self.remote.url}`; the next run builds it again."
