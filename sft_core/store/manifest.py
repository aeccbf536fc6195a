"""manifest.json of an output: digests of its files, of its content and of its identity, and the check against them."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft_core.store.digests import SHA256, hex_digest
from sft_core.store.ref import Ref

FileDigest = dict[str, Any]  # {"bytes": size, "sha256": hex}
MANIFEST = "manifest.json"
LOGS = "logs/"  # files for people: verified, but no part of the content that readers' keys are made of
KEY_HEX = 16  # 64 bits: a collision is out of reach for a store, and the manifest holds the full digest


class CorruptOutput(ValueError):
    """An output whose bytes are not those that were written."""


def check(ref: Ref, manifest: dict[str, Any], digest_of: Callable[[str], FileDigest | None], remedy: str) -> None:
    """Raises CorruptOutput, with the remedy, when a file is missing, or its digest or the manifest's own differs."""
    identity, content = sha256_of(manifest["identity"]), content_digest(manifest["files"])
    written = (manifest["identity_sha256"][:KEY_HEX], manifest["identity_sha256"], manifest["content"])
    if written != (ref.key, identity, content):
        raise CorruptOutput(f"{ref}: {MANIFEST} is not what was written. {remedy}")
    for name, entry in manifest["files"].items():
        digest = digest_of(name)
        if digest != entry:
            state = "is missing" if digest is None else f"has {digest['bytes']} bytes with another digest"
            raise CorruptOutput(
                f"{ref}: {name} {state} (written: {entry['bytes']} bytes, sha256 {entry['sha256'][:12]}). {remedy}"
            )


@functools.lru_cache(maxsize=4096)
def read_manifest(path: Path, mtime_ns: int) -> dict[str, Any]:
    """The manifest in a file that was last written at `mtime_ns`. Raises ValueError when it is no JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def content_digest(files: dict[str, FileDigest]) -> str:
    """The digest by which readers of an output know it: of its data files, by name."""
    return sha256_of({name: entry["sha256"] for name, entry in files.items() if not name.startswith(LOGS)})


def data_digest(manifest: dict[str, Any]) -> str:
    """The digest that names the folder of an output's files behind a URL: of all its files, logs too."""
    return sha256_of(manifest["files"])[:KEY_HEX]


def sha256_of(value: Any) -> str:
    """SHA-256 (hex) of a plain value's canonical JSON."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def files_of(folder: Path) -> list[Path]:
    """The files of an output, without its manifest, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def file_digest(path: Path) -> FileDigest:
    with path.open("rb", buffering=0) as file:
        return {"bytes": path.stat().st_size, "sha256": hex_digest(file, SHA256)}


def digest_in(folder: Path, name: str) -> FileDigest | None:
    """The digest of a file of the folder; None when the file is missing."""
    return file_digest(folder / name) if (folder / name).is_file() else None
