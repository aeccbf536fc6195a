"""manifest.json of an output: digests of its files, of its content and of its identity, and the checks against them."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from sft_core.store.digests import SHA256, XXH3, hex_digests
from sft_core.store.provenance import SourceCode, source_code
from sft_core.store.ref import Ref

if TYPE_CHECKING:
    from sft_core.store.made_by import MadeBy

MANIFEST = "manifest.json"
LOGS = "logs/"  # files for people: verified, but not part of the content, so no reader's key depends on them
KEY_HEX = 16  # 64 bits: a collision is out of reach for a store, and the manifest holds the full digest


class FileDigest(TypedDict):
    bytes: int
    sha256: str  # hex; it is in the content digest, and so in the keys of readers
    xxh3_128: NotRequired[str]  # hex, to verify: ten times as fast; manifests of before the key do not have it


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


def make_manifest(
    ref: Ref,
    identity: Identity,
    files: dict[str, FileDigest],
    counts: dict[str, Any],
    inputs: dict[str, Ref],
    seconds: float,
    by: MadeBy | None,
) -> Manifest:
    manifest: Manifest = {
        "ref": list(ref),
        "identity": identity,
        "identity_sha256": sha256_of(identity),
        "content": content_digest(files),
        "files": files,
        "counts": counts,
        "inputs": {name: list(input_ref) for name, input_ref in inputs.items()},
        "seconds": seconds,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "source_code": source_code(),
    }
    if by is not None:
        manifest["made_by"] = by
    manifest = json.loads(json.dumps(manifest, allow_nan=False))  # as a reader will find it: keys are strings
    return {**manifest, "sha256": manifest_digest(manifest)}


def parse_manifest(ref: Ref, text: str) -> Manifest:
    """Raises CorruptOutput, without a remedy, for a text that is not the one that was written."""
    try:
        manifest: Manifest = json.loads(text)
    except ValueError as error:
        raise CorruptOutput(f"{ref}: {MANIFEST} cannot be read ({error})") from None
    try:
        identity, content = sha256_of(manifest["identity"]), content_digest(manifest["files"])
        written = (manifest["identity_sha256"][:KEY_HEX], manifest["identity_sha256"], manifest["content"])
        of_all = manifest_digest(manifest)
        is_written = written == (ref.key, identity, content) and manifest.get("sha256", of_all) == of_all
    except (KeyError, TypeError, AttributeError):  # a damaged byte can be anywhere
        is_written = False
    if not is_written:
        raise CorruptOutput(f"{ref}: {MANIFEST} is not what was written")
    return manifest


@functools.lru_cache(maxsize=4096)
def read_manifest(ref: Ref, path: Path, mtime_ns: int) -> Manifest:
    """The manifest in a file that was last written at `mtime_ns`. Raises CorruptOutput, without a remedy."""
    return parse_manifest(ref, path.read_text(encoding="utf-8", errors="replace"))


DigestOf = Callable[[str, str], tuple[int, str] | None]  # (name, algorithm): bytes and hex digest; None: no such file


def check_files(ref: Ref, manifest: Manifest, names: Iterable[str], digest_of: DigestOf, remedy: str) -> None:
    """Raises CorruptOutput, with the remedy, for the first missing or altered file among the names."""
    for name in names:
        entry = manifest["files"][name]
        algorithm, digest = verified_by(entry)
        present = digest_of(name, algorithm)
        if present != (entry["bytes"], digest):
            state = "is missing" if present is None else f"has {present[0]} bytes with another digest"
            raise CorruptOutput(
                f"{ref}: {name} {state} (written: {entry['bytes']} bytes, {algorithm} {digest[:12]}). {remedy}"
            )


def verified_by(entry: FileDigest) -> tuple[str, str]:
    """The algorithm that verifies a file, and its digest by it."""
    fast = entry.get("xxh3_128")
    return (SHA256, entry["sha256"]) if fast is None else (XXH3, fast)


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


def files_of(folder: Path, without: Sequence[str] = ()) -> list[Path]:
    """The files of an output, without its manifest, sorted. without: patterns of names in the folder to leave out."""
    left_out = {path for pattern in without for path in folder.glob(pattern)}
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return sorted(path for path in files if left_out.isdisjoint((path, *path.parents)))


def file_digest(path: Path) -> FileDigest:
    with path.open("rb", buffering=0) as file:
        digests = hex_digests(file, (SHA256, XXH3))
        return {"bytes": path.stat().st_size, "sha256": digests[SHA256], "xxh3_128": digests[XXH3]}


def digest_in(folder: Path, name: str, algorithm: str) -> tuple[int, str] | None:
    """Size and digest of a file of the folder; None when the file is missing."""
    path = folder / name
    if not path.is_file():
        return None
    with path.open("rb", buffering=0) as file:
        return path.stat().st_size, hex_digests(file, [algorithm])[algorithm]


def digest_of(data: bytes, name: str, algorithm: str) -> tuple[int, str]:
    """Size and digest of a file's whole content."""
    return len(data), hex_digests(io.BytesIO(data), [algorithm])[algorithm]
