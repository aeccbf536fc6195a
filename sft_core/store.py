"""Stage, Store, Ref: outputs that are addressed by what went into them, whole or absent, and verifiable.

A folder of the store is an output only when it holds a manifest.json, which is written last, before the one
rename that makes the folder visible. Nothing else is ever read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from filelock import FileLock, Timeout

from sft_core.code import code_digest

if TYPE_CHECKING:
    from sft_core.pins import PinnedRecipe
    from sft_core.recipe import Runtime

log = logging.getLogger(__name__)
Part = dict[str, Any]
Needs = dict[str, tuple["Stage", Part]]
LOGS = "logs/"  # for people: verified, but no part of what a reader's key is made of
KEY_HEX = 16  # 64 bits: a collision is out of reach for a store, and the manifest holds the full digest


class Ref(NamedTuple):
    """A small plain address of an output: it survives a moved store."""

    stage: str
    key: str

    def __str__(self) -> str:
        return f"{self.stage}/{self.key}"


@dataclasses.dataclass(frozen=True)
class Build:
    """What a builder is given besides its slice of the recipe."""

    out: Path  # an empty folder, or that of the last attempt when the stage is resumable
    inputs: Mapping[str, Path]  # folders of the outputs it reads
    runtime: Runtime


@dataclasses.dataclass(frozen=True)
class Stage:
    """One kind of output: how it is made, and what its identity is made of.

    `section` gives the builder's keyword arguments from the recipe: the recipe's part of the identity. `places`
    says where things are (paths, where the section has digests); its values replace the section's of that name
    for the builder and are no part of the identity. `needs` names the outputs it reads. `version` replaces the
    digest of the builder's code where a rename must not cost days of training. The builder returns counts for
    the manifest: plain JSON, shown on cards.
    """

    name: str
    build: Callable[..., dict[str, Any]]
    section: Callable[[PinnedRecipe, Part], dict[str, Any]]
    places: Callable[[PinnedRecipe, Part], dict[str, Any]] = lambda pinned, part: {}
    needs: Callable[[PinnedRecipe, Part], Needs] = lambda pinned, part: {}
    version: int | None = None
    libraries: tuple[str, ...] = ()
    resumable: bool = False
    verify_inputs: bool = False

    @property
    def code(self) -> str | int:
        if self.version is not None:
            return self.version
        return code_digest(self.build.__module__, self.libraries)


@dataclasses.dataclass(frozen=True)
class Located:
    """Where an output is or would be. `depends`: the key hangs on an input that is not built yet, or on a name
    that could not be resolved."""

    stage: Stage
    part: Part
    status: Literal["hit", "build", "depends"]
    ref: Ref | None
    identity: dict[str, Any]

    @property
    def name(self) -> str:
        return part_name(self.part)


def part_name(part: Part) -> str:
    return ",".join(str(value) for value in part.values()) or "-"


class Unresolved(ValueError):
    """A name whose content is not known now: what is made from it has no key yet."""


class CorruptOutput(ValueError):
    """An output whose bytes are not those that were written."""


class Store:
    """A folder of outputs: <root>/<stage>/<key>/ with a manifest.json each."""

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser()

    # Locating

    def locate(self, stage: Stage, pinned: PinnedRecipe, part: Part, seen: dict | None = None) -> Located:
        """Where the output is or would be; nothing is built. `seen` shares work between calls for one recipe."""
        seen = {} if seen is None else seen
        name = (stage.name, json.dumps(part, sort_keys=True))
        if name not in seen:
            seen[name] = self._locate(stage, pinned, part, seen)
        return seen[name]

    def _locate(self, stage: Stage, pinned: PinnedRecipe, part: Part, seen: dict) -> Located:
        inputs: dict[str, str | None] = {}
        for name, (needed, needed_part) in stage.needs(pinned, part).items():
            found = self.locate(needed, pinned, needed_part, seen)
            inputs[name] = self.manifest(found.ref)["content"] if found.status == "hit" and found.ref else None
        identity = {"stage": stage.name, "part": part, "inputs": inputs, "code": stage.code}
        try:
            identity["section"] = stage.section(pinned, part)
        except Unresolved:
            return Located(stage, part, "depends", None, identity)
        if None in inputs.values():
            return Located(stage, part, "depends", None, identity)
        ref = Ref(stage.name, _sha256(identity)[:KEY_HEX])
        return Located(stage, part, "hit" if self.has(ref) else "build", ref, identity)

    def has(self, ref: Ref) -> bool:
        return (self.path(ref) / "manifest.json").is_file()

    def path(self, ref: Ref) -> Path:
        return self.root / ref.stage / ref.key

    def scratch(self, ref: Ref) -> Path:
        """Where a resumable build keeps its work until it is whole."""
        return self.root / ".partial" / f"{ref.stage}-{ref.key}"

    def manifest(self, ref: Ref) -> dict[str, Any]:
        path = self.path(ref) / "manifest.json"
        try:
            return _read_manifest(path, path.stat().st_mtime_ns)
        except ValueError as error:
            raise CorruptOutput(f"{ref}: manifest.json cannot be read ({error}). {_remedy(ref)}") from None

    # Building

    def ensure(self, stage: Stage, pinned: PinnedRecipe, seen: dict | None = None, **part: Any) -> Ref:
        """The output's address; it is built first when it is not there, and so are the outputs it reads.

        Two processes that ensure the same output build it once: the second waits for the first.
        Raises what the builder raises, with the stage named, and CorruptOutput for a damaged input.
        """
        seen = {} if seen is None else seen
        for needed, needed_part in stage.needs(pinned, part).values():
            if self.locate(needed, pinned, needed_part, seen).status != "hit":
                self.ensure(needed, pinned, seen, **needed_part)
                seen.clear()
        located = self.locate(stage, pinned, part, seen)
        assert located.ref is not None, f"{stage.name}: inputs are built, so the key is known"
        ref = located.ref
        if located.status == "hit":
            with contextlib.suppress(OSError):  # a store that others keep may be read-only, and its outputs still hit
                os.utime(self.path(ref))  # last used, for gc
            log.info("stage=%s part=%s key=%s status=hit", stage.name, located.name, ref.key)
            return ref
        self.check_writable()
        with self._lock(ref):
            if not self.has(ref):
                self._build(located, pinned)
        seen.clear()
        return ref

    def _build(self, located: Located, pinned: PinnedRecipe) -> None:
        stage, ref = located.stage, located.ref
        assert ref is not None
        refs = {
            name: self.locate(needed, pinned, part).ref
            for name, (needed, part) in stage.needs(pinned, located.part).items()
        }
        inputs = {name: self.path(input_ref) for name, input_ref in refs.items() if input_ref}
        if stage.verify_inputs:
            for input_ref in refs.values():
                self.verify(input_ref)
        out = self.scratch(ref)
        if not stage.resumable:
            shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        log.info("stage=%s part=%s key=%s status=build", stage.name, located.name, ref.key)
        started = time.monotonic()
        try:
            arguments = located.identity["section"] | stage.places(pinned, located.part)
            counts = stage.build(Build(out, inputs, pinned.recipe.runtime), **arguments)
            files = {str(path.relative_to(out)): _digest(path) for path in _files(out)}
            seconds = round(time.monotonic() - started, 3)
            manifest = {
                "ref": list(ref),
                "identity": located.identity,
                "identity_sha256": _sha256(located.identity),
                "content": _content(files),
                "files": files,
                "counts": counts,
                "inputs": {name: list(input_ref) for name, input_ref in refs.items() if input_ref},
                "seconds": seconds,
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "python": platform.python_version(),
            }
            # Manifest last, rename after it: a reader must never see half an output.
            _write_synced(out / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False))
            shutil.rmtree(self.path(ref), ignore_errors=True)  # what a killed removal left would stop the rename
            self.path(ref).parent.mkdir(parents=True, exist_ok=True)
            out.rename(self.path(ref))
            self._journal(located, seconds)
        except BaseException as error:
            if not stage.resumable:
                shutil.rmtree(out, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                full = f"no space is left for the store at {self.root}; `sft store gc` frees what is not used"
                error = OSError(error.errno, full).with_traceback(error.__traceback__)
            error.add_note(f"while building {stage.name} {located.name} ({ref})")
            raise error
        log.info("stage=%s part=%s key=%s seconds=%.1f", stage.name, located.name, ref.key, seconds)

    def _journal(self, located: Located, seconds: float) -> None:
        """One line a build, appended whole, so that what was built when can be counted."""
        line = json.dumps(
            {"stage": located.stage.name, "part": located.part, "ref": str(located.ref), "seconds": seconds}
        )
        with (self.root / "builds.jsonl").open("a", encoding="utf-8") as journal:
            journal.write(line + "\n")

    def check_writable(self) -> None:
        """Raises OSError with what to do when nothing can be written here."""
        try:
            (self.root / ".locks").mkdir(parents=True, exist_ok=True)
            probe = self.root / ".locks" / f".probe-{os.getpid()}"
            probe.write_text("x")
            probe.unlink()
        except OSError as error:
            raise OSError(
                error.errno,
                f"the store at {self.root.resolve()} cannot be written ({error.strerror}); "
                "free space or set runtime.store to a folder that can",
            ) from None

    @contextlib.contextmanager
    def _lock(self, ref: Ref) -> Iterator[None]:
        lock = FileLock(self.root / ".locks" / f"{ref.stage}-{ref.key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("stage=%s key=%s status=waiting another process builds it", ref.stage, ref.key)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    # Looking after

    def verify(self, ref: Ref | None) -> None:
        """Raises CorruptOutput when a file of the output is missing, or its digest or the manifest's own differs."""
        assert ref is not None
        manifest = self.manifest(ref)
        own = (manifest["identity_sha256"][:KEY_HEX], _sha256(manifest["identity"]), manifest["content"])
        if own != (ref.key, manifest["identity_sha256"], _content(manifest["files"])):
            raise CorruptOutput(f"{ref}: manifest.json is not what was written. {_remedy(ref)}")
        for name, entry in manifest["files"].items():
            path = self.path(ref) / name
            found = _digest(path) if path.is_file() else None
            if found != entry:
                state = "is missing" if found is None else f"has {found['bytes']} bytes with another digest"
                raise CorruptOutput(
                    f"{ref}: {name} {state} (written: {entry['bytes']} bytes, sha256 {entry['sha256'][:12]}). "
                    f"{_remedy(ref)}"
                )

    def refs(self) -> list[Ref]:
        """Every output, oldest use first."""
        manifests = self.root.glob("[!.]*/*/manifest.json")
        folders = sorted((path.parent for path in manifests), key=lambda folder: folder.stat().st_mtime)
        return [Ref(folder.parent.name, folder.name) for folder in folders]

    def find(self, text: str) -> Ref:
        """The output that `stage/key` or the start of its key names. Raises ValueError when none or several do."""
        stage, _, key = text.rpartition("/")
        found = [ref for ref in self.refs() if ref.key.startswith(key) and (not stage or ref.stage == stage)]
        if len(found) != 1:
            what = "no output" if not found else f"{len(found)} outputs"
            raise ValueError(f"{what} of the store at {self.root} match {text!r}; `sft store list` shows them")
        return found[0]

    def num_bytes(self, ref: Ref) -> int:
        return sum(path.stat().st_size for path in _files(self.path(ref)))

    def last_used(self, ref: Ref) -> float:
        return self.path(ref).stat().st_mtime

    def remove(self, ref: Ref) -> None:
        with self._lock(ref):
            # The manifest first: what is left of a half-removed folder is not an output.
            (self.path(ref) / "manifest.json").unlink()
            shutil.rmtree(self.path(ref))

    def abandoned(self) -> list[Path]:
        """Scratch folders of builds that no process works on."""
        return [path for path in sorted((self.root / ".partial").glob("*")) if not self._is_locked(path.name)]

    def _is_locked(self, name: str) -> bool:
        lock = FileLock(self.root / ".locks" / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        return False


@functools.lru_cache(maxsize=4096)
def _read_manifest(path: Path, stamp: int) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _remedy(ref: Ref) -> str:
    return f"Remove it with `sft store gc {ref} --delete`; the next run builds it again."


def _content(files: dict[str, dict[str, Any]]) -> str:
    """The digest by which readers of an output know it: of its data files, by name."""
    return _sha256({name: entry["sha256"] for name, entry in files.items() if not name.startswith(LOGS)})


def _sha256(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
