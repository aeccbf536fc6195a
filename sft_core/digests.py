"""Digests of the files of a folder, such as a checkpoint: written last, so that half a folder has none.

Training waits for them, so they are XXH3, which finds damage. What names an output is SHA-256 (see manifest.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from sft_core.manifest import write_synced

DIGESTS = "digests.json"
_ALGORITHM = "xxh3_128"
# Folders with SHA-256 are of a time when digests.json was {file name: digest} and named no algorithm.
_HASHES: dict[str, Callable[[], Any]] = {_ALGORITHM: xxhash.xxh3_128, "sha256": hashlib.sha256}
_BLOCK_BYTES = 4 * 2**20  # a call costs next to nothing of it, and the processor's cache holds it


def write_digests(folder: Path) -> None:
    """Writes digests.json of all files below the folder, and syncs it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / DIGESTS)
    digests = {path.relative_to(folder).as_posix(): _digest(path, _ALGORITHM) for path in files}
    write_synced(folder / DIGESTS, json.dumps({"algorithm": _ALGORITHM, "files": digests}))


def is_whole(folder: Path) -> bool:
    """Whether its files are those that were written. Raises ValueError for an algorithm that is not known here."""
    try:
        written = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
        algorithm, digests = (written["algorithm"], written["files"]) if "algorithm" in written else ("sha256", written)
    except (OSError, ValueError, KeyError):
        return False
    if algorithm not in _HASHES:
        raise ValueError(
            f"{folder / DIGESTS}: found digests by {algorithm}, expected {' or '.join(_HASHES)}. A later version wrote "
            f"them: go on with that one, or remove {folder.name}"
        )
    try:
        return all(_digest(folder / name, algorithm) == digest for name, digest in digests.items())
    except OSError:
        return False


def _digest(path: Path, algorithm: str) -> str:
    # Not mapped into memory, though that is twice as fast: a disk's error would end the process by a signal.
    digest, block = _HASHES[algorithm](), memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while num_bytes := file.readinto(block):
            digest.update(block[:num_bytes])
    return digest.hexdigest()
