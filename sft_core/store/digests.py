"""Digests of files, and digests.json, which is written last into a folder: half a checkpoint has none.

XXH3 finds damage, and training and readers wait for little of it; digests that name an output are SHA-256
(sft_core/store/manifest.py).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import xxhash

DIGESTS = "digests.json"
XXH3, SHA256 = "xxh3_128", "sha256"
_HASHES: dict[str, Callable[[], Any]] = {XXH3: xxhash.xxh3_128, SHA256: hashlib.sha256}
_BLOCK_BYTES = 4 * 2**20  # XXH3 reads 12 GiB/s by blocks of 4 MiB, 8 by the 256 KiB of hashlib.file_digest


class Readable(Protocol):
    """An open file, here or behind a URL."""

    def readinto(self, buffer: memoryview, /) -> int | None: ...


def hex_digests(file: Readable, algorithms: Sequence[str]) -> dict[str, str]:
    """The digests of a file from its read position on, by algorithm. The file is read once."""
    # Read, not mapped into memory, though that is twice as fast: a disk's error would end the process by a signal.
    digests, block = {name: _HASHES[name]() for name in algorithms}, memoryview(bytearray(_BLOCK_BYTES))
    while num_bytes := file.readinto(block):
        for digest in digests.values():
            digest.update(block[:num_bytes])
    return {name: digest.hexdigest() for name, digest in digests.items()}


def write_digests(folder: Path) -> None:
    """Writes digests.json of all files below the folder, and syncs it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / DIGESTS)
    digests = {path.relative_to(folder).as_posix(): _digest_of(path, XXH3) for path in files}
    write_synced(folder / DIGESTS, json.dumps({"algorithm": XXH3, "files": digests}))


def is_whole(folder: Path) -> bool:
    """Whether all files that digests.json lists have the digests in it. False without a readable digests.json.

    Raises ValueError for an algorithm that this version does not know.
    """
    try:
        written = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
        # The first form of digests.json was {file name: SHA-256} and named no algorithm.
        algorithm, digests = (written["algorithm"], written["files"]) if "algorithm" in written else (SHA256, written)
    except (OSError, ValueError, KeyError):
        return False
    if algorithm not in _HASHES:
        raise ValueError(
            f"{folder / DIGESTS}: found digests by {algorithm}, expected {' or '.join(_HASHES)}. A later version wrote "
            f"them: go on with that one, or remove {folder.name}"
        )
    try:
        return all(_digest_of(folder / name, algorithm) == digest for name, digest in digests.items())
    except OSError:
        return False


def write_synced(path: Path, text: str) -> None:
    """Writes a file and waits for the disk: after it a crash of the machine loses none of the text."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(paths: Iterable[Path]) -> None:
    """Waits until the disk has the files and folders, so that a crash of the machine loses none of them."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _digest_of(path: Path, algorithm: str) -> str:
    with path.open("rb", buffering=0) as file:
        return hex_digests(file, [algorithm])[algorithm]
