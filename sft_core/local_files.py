"""Files and folders of this machine: whether a name means one, and digests of their contents."""

from __future__ import annotations

import hashlib
from pathlib import Path

_SUFFIXES = (".jsonl", ".json", ".parquet", ".gz", ".zst")


def is_local(name: str) -> bool:
    """Whether the name is an existing file or folder, or cannot be a hub id, `owner/name`."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def looks_like_files(name: str) -> bool:
    """Whether the name has the form of data files, existing or not: a glob, a known suffix, or no hub id."""
    return "*" in name or name.count("/") != 1 or name.endswith(_SUFFIXES)


def digest_files(files: list[Path]) -> str:
    """SHA-256 (hex) over names and contents: moving a folder changes nothing, renaming a file does."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest()
