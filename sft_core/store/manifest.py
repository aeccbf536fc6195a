"""manifest.json of an output: digests of its files, of its content and of its identity, and the check against them."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from sft_core.store.digests import SHA256, hex_digest
from sft_core.store.ref import Ref

if TYPE_CHECKING:
    from sft_core.store.made_by import MadeBy
    from sft_core.store.provenance import SourceCode

MANIFEST = "manifest.json"
LOGS = "logs/"  # files for people: verified, but not part of the content, so no reader's key depends on them
KEY_HEX = 16  # 64 bits: a collision is out of reach for a store, and the manifest holds the full digest


class FileDigest(TypedDict):
    bytes: int
    sha256: str  # hex


class Identity(TypedDict):
    """All that an output depends on; the output's key is a digest of it."""

    stage: str
    part: dict[str, Any]
    inputs: dict[str, str | None]  # the content digest of each input; None for one that is not built
    code: str | int
    section: NotRequired[dict[str, Any]]  # missing while a name in it is not resolved


class Manifest(TypedDict):
    """manifest.json. What each stage writes into `counts`, its builder's module says."""

    ref: list[str]
    identity: Identity
    identity_sha256: str
    content: str  # content_digest of the files
    files: dict[str, FileDigest]
    counts: dict[str, Any]
    inputs: dict[str, list[str]]  # the refs of the outputs that the builder read
    seconds: float
    created: str
    python: str
    source_code: SourceCode
    made_by: NotRequired[MadeBy]  # where the identity has a version
    sha256: NotRequired[str]  # hex, of all other keys; manifests of before the key do not have it


class CorruptOutput(ValueError):
    """An output whose bytes are not those that were written."""


def check(ref: Ref, manifest: Manifest, digest_of: Callable[[str], FileDigest | None], remedy: str) -> None:
    """Raises CorruptOutput, with the remedy, for a missing or altered file, and for an altered manifest."""
    identity, content = sha256_of(manifest["identity"]), content_digest(manifest["files"])
    written = (manifest["identity_sha256"][:KEY_HEX], manifest["identity_sha256"], manifest["content"])
    of_all = manifest_digest(manifest)
    if written != (ref.key, identity, content) or manifest.get("sha256", of_all) != of_all:
        raise CorruptOutput(f"{ref}: {MANIFEST} is not what was written. {remedy}")
    for name, entry in manifest["files"].items():
        digest = digest_of(name)
        if digest != entry:
            state = "is missing" if digest is None else f"has {digest['bytes']} bytes with another digest"
            raise CorruptOutput(
                f"{ref}: {name} {state} (written: {entry['bytes']} bytes, sha256 {entry['sha256'][:12]}). {remedy}"
            )


@functools.lru_cache(maxsize=4096)
def read_manifest(path: Path, mtime_ns: int) -> Manifest:
    """The manifest in a file that was last written at `mtime_ns`. Raises ValueError when it is no JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def content_digest(files: dict[str, FileDigest]) -> str:
    """The digest of an output's data files by name. It goes into the keys of the outputs that read this one."""
    return sha256_of({name: entry["sha256"] for name, entry in files.items() if not name.startswith(LOGS)})


def manifest_digest(manifest: Manifest) -> str:
    """The digest of a manifest, its counts too; without the key that holds it."""
    return sha256_of({name: value for name, value in manifest.items() if name != "sha256"})


def data_digest(manifest: Manifest) -> str:
    """The digest of all files of an output, logs too. It names the folder of the files behind a URL."""
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
