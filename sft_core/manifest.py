"""What an output says of itself, and whether it is true: digests of its files, of its content and of its identity."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sft_core.store import Ref

FileDigest = dict[str, Any]  # {"bytes": size, "sha256": hex}
LOGS = "logs/"  # for people: verified, but no part of what a reader's key is made of
KEY_HEX = 16  # 64 bits: a collision is out of reach for a store, and the manifest holds the full digest


class CorruptOutput(ValueError):
    """An output whose bytes are not those that were written."""


def check(ref: Ref, manifest: dict[str, Any], digest_of: Callable[[str], FileDigest | None], remedy: str) -> None:
    """Raises CorruptOutput, with the remedy, when a file is missing, or its digest or the manifest's own differs."""
    own = (manifest["identity_sha256"][:KEY_HEX], sha256_of(manifest["identity"]), manifest["content"])
    if own != (ref.key, manifest["identity_sha256"], content_digest(manifest["files"])):
        raise CorruptOutput(f"{ref}: manifest.json is not what was written. {remedy}")
    for name, entry in manifest["files"].items():
        found = digest_of(name)
        if found != entry:
            state = "is missing" if found is None else f"has {found['bytes']} bytes with another digest"
            raise CorruptOutput(
                f"{ref}: {name} {state} (written: {entry['bytes']} bytes, sha256 {entry['sha256'][:12]}). {remedy}"
            )


@functools.lru_cache(maxsize=4096)
def read_manifest(path: Path, stamp: int) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def content_digest(files: dict[str, FileDigest]) -> str:
    """The digest by which readers of an output know it: of its data files, by name."""
    return sha256_of({name: entry["sha256"] for name, entry in files.items() if not name.startswith(LOGS)})


def data_digest(manifest: dict[str, Any]) -> str:
    """Names what an output's files are behind a URL: of all of them, logs too."""
    return sha256_of(manifest["files"])[:KEY_HEX]


def sha256_of(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")


def digest(path: Path) -> FileDigest:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def digest_in(folder: Path, name: str) -> FileDigest | None:
    """Of a file of the folder; None when it is missing."""
    return digest(folder / name) if (folder / name).is_file() else None


def write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
