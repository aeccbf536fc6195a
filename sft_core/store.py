"""Stage, Store, Ref: outputs that are addressed by what went into them, whole or absent, and verifiable.

A folder of the store is an output only when it holds a manifest.json, which is written last, before the one
rename that makes the folder visible. Nothing else is ever read. Behind a URL (remote.py) the same holds: outputs are
made in a local folder, uploaded manifest last, and read from there, where they are downloaded when they are missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import logging
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple

from filelock import FileLock, Timeout

from sft_core.code import code_digest
from sft_core.manifest import (
    KEY_HEX,
    CorruptOutput,
    check,
    content_digest,
    data_digest,
    digest,
    digest_in,
    files_of,
    read_manifest,
    sha256_of,
    write_synced,
)
from sft_core.source_code import source_code

if TYPE_CHECKING:
    from sft_core.pins import PinnedRecipe
    from sft_core.remote import Remote
    from sft_core.sections import Runtime

log = logging.getLogger(__name__)
Part = dict[str, Any]
Needs = dict[str, tuple["Stage", Part]]
NOTED_S = 86400  # how often a use is noted behind a URL: each note is a request


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
    upload: Callable[[Path], None] | None = None  # of a store behind a URL
    manifests: Mapping[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # of all inputs, `mentions` too

    def keep(self, folder: Path) -> None:
        """Keeps a finished folder below `out`, such as a checkpoint, where the loss of this machine does not reach it.

        A store behind a URL uploads it; in a folder store it is where it should be, and nothing happens. A build
        that starts with an empty `out` finds there, under the same names, what was kept; a damaged one is left out.
        All of it goes once the output is whole.

        The folder holds the digests.json that `write_digests` (sft_core/digests.py) writes, which is uploaded last.
        Kept folders that are gone from `out` are dropped, so that there are no more than here; one that goes while
        it is uploaded is not kept. Call it in the process that builds, one folder at a time; a thread beside the work
        may. Raises OSError when the store cannot be reached.
        """
        if self.upload is not None:
            self.upload(folder)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One kind of output: how it is made, and what its identity is made of.

    `section` gives the builder's keyword arguments from the recipe: the recipe's part of the identity. `places`
    says where things are (paths, where the section has digests); its values replace the section's of that name
    for the builder and are no part of the identity. `needs` names the outputs it reads, `mentions` those of which it
    reads the manifest alone: nothing else of them is downloaded. `version` replaces the digest of the builder's code
    where a rename must not cost days of training. `modules` names those that the builder reaches through an object
    among `places`, which its imports do not show: their code counts as the builder's. The builder returns counts for
    the manifest: plain JSON, shown on cards.
    """

    name: str
    build: Callable[..., dict[str, Any]]
    section: Callable[[PinnedRecipe, Part], dict[str, Any]]
    places: Callable[[PinnedRecipe, Part], dict[str, Any]] = lambda pinned, part: {}
    needs: Callable[[PinnedRecipe, Part], Needs] = lambda pinned, part: {}
    mentions: Callable[[PinnedRecipe, Part], Needs] = lambda pinned, part: {}
    modules: Callable[[PinnedRecipe, Part], tuple[str, ...]] = lambda pinned, part: ()
    version: int | None = None
    libraries: tuple[str, ...] = ()
    resumable: bool = False
    verify_inputs: bool = False

    def code(self, pinned: PinnedRecipe, part: Part) -> str | int:
        """The code's part of the identity."""
        if self.version is not None:
            return self.version
        return code_digest(self.build.__module__, self.libraries, others=self.modules(pinned, part))

    def inputs(self, pinned: PinnedRecipe, part: Part) -> Needs:
        """All outputs that must be there before it is built: what they hold is part of the identity."""
        return {**self.needs(pinned, part), **self.mentions(pinned, part)}


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


def is_url(root: str | Path) -> bool:
    return "://" in str(root)


class Store:
    """A folder of outputs: <root>/<stage>/<key>/ with a manifest.json each; or such a folder as the cache of a URL.

    With a URL an output is there when the URL has it, and the folder holds what was made or read on this machine.
    """

    def __init__(self, root: str | Path):
        self.remote: Remote | None = None
        if is_url(root):
            from sft_core.remote import Remote

            self.remote = Remote(str(root))
        self.root = self.remote.cache if self.remote else Path(root).expanduser()
        self.address = self.remote.url if self.remote else str(self.root)

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
        for name, (needed, needed_part) in stage.inputs(pinned, part).items():
            found = self.locate(needed, pinned, needed_part, seen)
            inputs[name] = self.manifest(found.ref)["content"] if found.status == "hit" and found.ref else None
        identity = {"stage": stage.name, "part": part, "inputs": inputs, "code": stage.code(pinned, part)}
        try:
            identity["section"] = stage.section(pinned, part)
        except Unresolved:
            return Located(stage, part, "depends", None, identity)
        if None in inputs.values():
            return Located(stage, part, "depends", None, identity)
        ref = Ref(stage.name, sha256_of(identity)[:KEY_HEX])
        return Located(stage, part, "hit" if self.has(ref) else "build", ref, identity)

    def refresh(self) -> None:
        """What other machines have made meanwhile is there too."""
        if self.remote:
            self.remote.forget()

    def has(self, ref: Ref) -> bool:
        return ref in self.remote.outputs() if self.remote else self.is_here(ref)

    def is_here(self, ref: Ref) -> bool:
        """Whether it can be read without a download."""
        return (self._folder(ref) / "manifest.json").is_file()

    def path(self, ref: Ref) -> Path:
        """The output's folder, to read; it is downloaded first where only the URL has it. Raises CorruptOutput."""
        if self.remote and not self.is_here(ref) and self.has(ref):
            self._download(self.remote, ref)
        return self._folder(ref)

    def open(self, ref: Ref, name: str) -> IO[bytes]:
        """A file of an output, to read a part of: a column of a table comes without the rest, and is not cached."""
        if self.remote and not self.is_here(ref):
            return self.remote.open(ref, data_digest(self.manifest(ref)), name)
        return (self._folder(ref) / name).open("rb")

    def _folder(self, ref: Ref) -> Path:
        return self.root / ref.stage / ref.key

    def scratch(self, ref: Ref) -> Path:
        """Where a resumable build keeps its work until it is whole."""
        return self.root / ".partial" / f"{ref.stage}-{ref.key}"

    def manifest(self, ref: Ref) -> dict[str, Any]:
        path = self._folder(ref) / "manifest.json"
        if self.remote and not path.is_file():
            path = self._cached_manifest(ref)
            if not path.is_file():
                self._fetch_manifest(self.remote, ref)
        try:
            return read_manifest(path, path.stat().st_mtime_ns)
        except ValueError as error:
            raise CorruptOutput(f"{ref}: manifest.json cannot be read ({error}). {self._remedy(ref)}") from None

    # Building

    def ensure(self, stage: Stage, pinned: PinnedRecipe, seen: dict | None = None, **part: Any) -> Ref:
        """The output's address; it is built first when it is not there, and so are the outputs it reads.

        Two processes that ensure the same output build it once: the second waits for the first.
        Raises what the builder raises, with the stage named, and CorruptOutput for a damaged input.
        """
        seen = {} if seen is None else seen
        for needed, needed_part in stage.inputs(pinned, part).values():
            if self.locate(needed, pinned, needed_part, seen).status != "hit":
                self.ensure(needed, pinned, seen, **needed_part)
                seen.clear()
        located = self.locate(stage, pinned, part, seen)
        assert located.ref is not None, f"{stage.name}: inputs are built, so the key is known"
        ref = located.ref
        if located.status == "hit":
            with contextlib.suppress(OSError):  # a store that others keep may be read-only, and its outputs still hit
                self._note_use(ref)
            log.info("stage=%s part=%s key=%s status=hit", stage.name, located.name, ref.key)
            return ref
        self.check_writable()
        with self._lock(ref):
            if self.remote:
                self.remote.forget()  # another machine may have built it meanwhile
            if not self.has(ref):
                if self.is_here(ref):
                    self.verify(ref)  # of a process that ended before all of it was uploaded
                else:
                    self._build(located, pinned)
                if self.remote:
                    self._publish(self.remote, ref)
                    if stage.resumable:
                        self.remote.drop_kept(self.scratch(ref).name)
        seen.clear()
        return ref

    def _note_use(self, ref: Ref) -> None:
        """Last used, for gc."""
        if not self.remote or self.is_here(ref):
            os.utime(self._folder(ref))
        if self.remote and self.last_used(ref) < time.time() - NOTED_S:
            self.remote.touch(ref)

    def _build(self, located: Located, pinned: PinnedRecipe) -> None:
        stage, ref = located.stage, located.ref
        assert ref is not None
        refs = {
            name: self.locate(needed, pinned, part).ref
            for name, (needed, part) in stage.inputs(pinned, located.part).items()
        }
        read = stage.needs(pinned, located.part)
        inputs = {name: self.path(input_ref) for name, input_ref in refs.items() if input_ref and name in read}
        if stage.verify_inputs:
            for name in inputs:
                self.verify(refs[name])
        manifests = {name: self.manifest(input_ref) for name, input_ref in refs.items() if input_ref}
        out = self.scratch(ref)
        if not stage.resumable:
            shutil.rmtree(out, ignore_errors=True)
        elif self.remote:
            self._fetch_kept(self.remote, ref)
        out.mkdir(parents=True, exist_ok=True)
        log.info("stage=%s part=%s key=%s status=build", stage.name, located.name, ref.key)
        started = time.monotonic()
        try:
            arguments = located.identity["section"] | stage.places(pinned, located.part)
            upload = functools.partial(self.remote.keep, out.name, out) if self.remote and stage.resumable else None
            counts = stage.build(Build(out, inputs, pinned.recipe.runtime, upload, manifests), **arguments)
            files = {str(path.relative_to(out)): digest(path) for path in files_of(out)}
            seconds = round(time.monotonic() - started, 3)
            manifest = {
                "ref": list(ref),
                "identity": located.identity,
                "identity_sha256": sha256_of(located.identity),
                "content": content_digest(files),
                "files": files,
                "counts": counts,
                "inputs": {name: list(input_ref) for name, input_ref in refs.items() if input_ref},
                "seconds": seconds,
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "python": platform.python_version(),
                "source_code": source_code(),
            }
            # Manifest last, rename after it: a reader must never see half an output.
            write_synced(out / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False))
            self._put_in_place(out, ref)
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

    def _put_in_place(self, out: Path, ref: Ref) -> None:
        shutil.rmtree(self._folder(ref), ignore_errors=True)  # what a killed removal left would stop the rename
        self._folder(ref).parent.mkdir(parents=True, exist_ok=True)
        out.rename(self._folder(ref))

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
                f"free space or set {'SFT_CACHE' if self.remote else 'runtime.store'} to a folder that can",
            ) from None
        if self.remote:
            self.remote.check_writable()

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

    # Behind a URL

    def _publish(self, remote: Remote, ref: Ref) -> None:
        """Uploads what is whole here, unless another machine was first: then that one's is read."""
        manifest, started = self.manifest(ref), time.monotonic()
        data = data_digest(manifest)
        try:
            won = remote.publish(ref, self._folder(ref), manifest["files"], data)
        except BaseException as error:
            error.add_note(f"while uploading {ref}; it is whole in {self._folder(ref)}, and the next run uploads it")
            raise
        status = "uploaded" if won else "lost another machine was first; its output is read"
        log.info("stage=%s key=%s seconds=%.1f status=%s", ref.stage, ref.key, time.monotonic() - started, status)
        if not won:
            self._remove_here(ref)
            remote.forget()
            if data_digest(self.manifest(ref)) != data:
                remote.remove_data(ref, data)

    def _download(self, remote: Remote, ref: Ref) -> None:
        with self._lock(ref):
            if self.is_here(ref):
                return
            started, out = time.monotonic(), self._fetching(ref)
            try:
                manifest = self._fetch_manifest(remote, ref)
                remote.download(ref, out, manifest["files"], data_digest(manifest))
                check(ref, manifest, functools.partial(digest_in, out), self._remedy(ref))
                shutil.copyfile(self._cached_manifest(ref), out / "manifest.json")
                self._put_in_place(out, ref)
            except FileNotFoundError as error:
                raise CorruptOutput(f"{ref}: {error}. {self._remedy(ref)}") from None
            finally:
                shutil.rmtree(out, ignore_errors=True)
        num_bytes, seconds = sum(entry["bytes"] for entry in manifest["files"].values()), time.monotonic() - started
        log.info("stage=%s key=%s seconds=%.1f status=downloaded bytes=%d", ref.stage, ref.key, seconds, num_bytes)

    def _fetch_kept(self, remote: Remote, ref: Ref) -> None:
        """What a build on another machine has kept, where there is nothing of this one's."""
        out = self.scratch(ref)
        if out.is_dir() and any(out.iterdir()):
            return
        fetched = self._fetching(ref)
        remote.fetch_kept(out.name, fetched)
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        fetched.rename(out)  # at once: a build that finds some of it would never ask for the rest

    def _fetching(self, ref: Ref) -> Path:
        """An empty folder for a download, which is visible to nobody before it is renamed."""
        out = self.root / ".fetching" / f"{ref.stage}-{ref.key}"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        return out

    def _cached_manifest(self, ref: Ref) -> Path:
        return self.root / ".manifests" / f"{ref.stage}-{ref.key}.json"

    def _fetch_manifest(self, remote: Remote, ref: Ref) -> dict[str, Any]:
        text, path = remote.read(ref), self._cached_manifest(ref)
        try:
            manifest = json.loads(text)  # before it is cached: one that cannot be read must not outlive its removal
        except ValueError as error:
            raise CorruptOutput(f"{ref}: manifest.json cannot be read ({error}). {self._remedy(ref)}") from None
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
        return manifest

    # Looking after

    def verify(self, ref: Ref | None, *, remote: bool = False) -> None:
        """Raises CorruptOutput when a file of the output is missing, or its digest or the manifest's own differs.

        Of a store behind a URL: of the copy that is read here, or, with `remote`, of what lies behind the URL.
        """
        assert ref is not None
        if self.remote and remote:
            manifest = self._fetch_manifest(self.remote, ref)
            digest_of = functools.partial(self.remote.digest_of, ref, data_digest(manifest))
            check(ref, manifest, digest_of, self._remedy(ref))
        else:
            folder = self.path(ref)
            remedy = self._remedy(ref, copy=self.remote is not None)
            check(ref, self.manifest(ref), functools.partial(digest_in, folder), remedy)

    def _remedy(self, ref: Ref, *, copy: bool = False) -> str:
        if copy:
            return f"Remove {self._folder(ref)}, the copy here; the next run reads or builds it again."
        there = f" --store {self.address}" if self.remote else ""
        return f"Remove it with `sft store gc {ref} --delete{there}`; the next run builds it again."

    def refs(self) -> list[Ref]:
        """Every output, oldest use first."""
        if self.remote:
            used = self.remote.outputs()
            return [Ref(*ref) for ref in sorted(used, key=lambda ref: used[ref])]
        manifests = self.root.glob("[!.]*/*/manifest.json")
        folders = sorted((path.parent for path in manifests), key=lambda folder: folder.stat().st_mtime)
        return [Ref(folder.parent.name, folder.name) for folder in folders]

    def find(self, text: str) -> Ref:
        """The output that `stage/key` or the start of its key names. Raises ValueError when none or several do."""
        stage, _, key = text.rpartition("/")
        found = [ref for ref in self.refs() if ref.key.startswith(key) and (not stage or ref.stage == stage)]
        if len(found) != 1:
            what = "no output" if not found else f"{len(found)} outputs"
            raise ValueError(f"{what} of the store at {self.address} match {text!r}; `sft store list` shows them")
        return found[0]

    def num_bytes(self, ref: Ref) -> int:
        if self.remote:
            return self.remote.sizes().get(f"{ref.stage}-{ref.key}", 0)
        return sum(path.stat().st_size for path in files_of(self._folder(ref)))

    def last_used(self, ref: Ref) -> float:
        return self.remote.outputs()[ref] if self.remote else self._folder(ref).stat().st_mtime

    def remove(self, ref: Ref) -> None:
        with self._lock(ref):
            if self.remote:
                self.remote.remove(ref)
            self._remove_here(ref)

    def _remove_here(self, ref: Ref) -> None:
        if not self.remote or self.is_here(ref):
            # The manifest first: what is left of a half-removed folder is not an output.
            (self._folder(ref) / "manifest.json").unlink()
            shutil.rmtree(self._folder(ref))
        self._cached_manifest(ref).unlink(missing_ok=True)

    def abandoned(self) -> list[Path]:
        """Scratch folders of builds and downloads that no process works on."""
        found = sorted([*self.root.glob(".partial/*"), *self.root.glob(".fetching/*")])
        return [path for path in found if not self._is_locked(path.name)]

    def _is_locked(self, name: str) -> bool:
        lock = FileLock(self.root / ".locks" / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        return False
