"""Store: outputs that are addressed by what went into them, whole or absent, and verifiable.

A folder of the store is an output only when it holds a manifest.json, which is written last, before the one rename that
makes the folder visible. Readers read nothing else. A store behind a URL (remote.py) keeps the same promise: its
outputs are built in a local folder and uploaded manifest last; readers download them into a local folder (cached.py).
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import glob
import json
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from sft_core.store.cached import Cached
from sft_core.store.digests import sync, write_synced
from sft_core.store.folders import Folders, remove_matching
from sft_core.store.lookups import Lookups
from sft_core.store.manifest import (
    KEY_HEX,
    MANIFEST,
    CorruptOutput,
    Identity,
    Manifest,
    check_files,
    data_digest,
    digest_in,
    digest_of,
    file_digest,
    files_of,
    make_manifest,
    parse_manifest,
    read_manifest,
    sha256_of,
)
from sft_core.store.ref import Ref
from sft_core.store.stage import Build, Located, Part, S, Stage, Unresolved
from sft_core.store.verified import Verified

log = logging.getLogger(__name__)
USE_NOTED_S = 86400  # at most one note of a use behind a URL in this time: each note is a request


def is_url(root: str | Path) -> bool:
    return "://" in str(root)


class Store:
    """A folder of outputs: <root>/<stage>/<key>/ with a manifest.json each; or such a folder as the cache of a URL.

    With a URL an output is there when the URL has it, and the folder holds what was built or read on this machine.
    """

    def __init__(self, root: str | Path):
        if is_url(root):
            from sft_core.store.remote import Remote

            self.remote: Remote | None = Remote(str(root))
            self.root, self.address = self.remote.cache, self.remote.url
        else:
            self.remote = None
            self.root = Path(root).expanduser()
            self.address = str(self.root)
        self._folders = Folders(self.root)
        self._cached = Cached(self.remote, self._folders) if self.remote else None
        self._verified = Verified()

    # Locating

    def locate(self, stage: Stage[S], subject: S, part: Part, lookups: Lookups | None = None) -> Located:
        """Where the output is or would be; nothing is built. Calls for one subject share work through `lookups`."""
        lookups = Lookups() if lookups is None else lookups
        located = lookups.get(stage, part)
        if located is None:
            located = self._locate(stage, subject, part, lookups)
            lookups.add(located)
        return located

    def _locate(self, stage: Stage[S], subject: S, part: Part, lookups: Lookups) -> Located:
        contents: dict[str, str | None] = {}
        for name, (needed, needed_part) in stage.inputs(subject, part).items():
            located = self.locate(needed, subject, needed_part, lookups)
            built = located.ref if located.status == "hit" else None
            contents[name] = self.manifest(built)["content"] if built else None
        code = lookups.code(stage, subject, part)
        identity = Identity(stage=stage.name, part=part, inputs=contents, code=code)
        try:
            identity["section"] = dict(stage.section(subject, part))
        except Unresolved:
            return Located(stage, part, "depends", None, identity)
        if None in contents.values():
            return Located(stage, part, "depends", None, identity)
        ref = Ref(stage.name, sha256_of(identity)[:KEY_HEX])
        return Located(stage, part, "hit" if self.has(ref) else "build", ref, identity)

    # Reading

    def refresh(self) -> None:
        """Forgets the listing of a URL, so that outputs that other machines have built since count too."""
        if self.remote:
            self.remote.forget()

    def has(self, ref: Ref) -> bool:
        return ref in self.remote.outputs() if self.remote else self.is_here(ref)

    def is_here(self, ref: Ref) -> bool:
        """Whether the output can be read without a download."""
        return self._folders.is_here(ref)

    def path(self, ref: Ref, *patterns: str) -> Path:
        """The output's folder, to read; it is downloaded first when only the URL has it.

        The files that match one of the patterns, or all without a pattern, are verified, each once in a process. Read
        no others. Raises CorruptOutput for a missing or altered one.
        """
        self._fetch(ref)
        files = self.manifest(ref)["files"]
        chosen = [name for name in files if not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
        self._verified.check(ref, self.manifest(ref), self._folders.output(ref), chosen, self._remedy_here(ref))
        return self._folders.output(ref)

    def _fetch(self, ref: Ref) -> None:
        if self._cached and not self.is_here(ref) and self.has(ref):
            self._cached.download(ref)

    def read(self, ref: Ref, name: str) -> bytes:
        """A whole file of an output, verified; behind a URL only that file is fetched. Raises CorruptOutput."""
        with self.open(ref, name) as file:
            data = file.read()
        check_files(ref, self.manifest(ref), [name], functools.partial(digest_of, data), self._remedy(ref))
        return data

    def open(self, ref: Ref, name: str) -> IO[bytes]:
        """A file of an output, open to read a part of it.

        The file is verified where it is on this machine. Behind a URL only the part that is read is fetched: it is not
        cached and cannot be verified, so no output is made from it.
        """
        if self.remote and not self.is_here(ref):
            return self.remote.open(ref, data_digest(self.manifest(ref)), name)
        return (self.path(ref, glob.escape(name)) / name).open("rb")

    def scratch(self, ref: Ref) -> Path:
        """The folder in which a build works. For a resumable stage it stays until the output is whole."""
        return self._folders.scratch(ref)

    def manifest(self, ref: Ref) -> Manifest:
        """Raises CorruptOutput when it is not what was written, and FileNotFoundError without the output."""
        path = self._folders.manifest(ref)
        if self._cached and not path.is_file():
            path = self._cached.manifest_path(ref)
        try:
            return read_manifest(ref, path, path.stat().st_mtime_ns)
        except FileNotFoundError:
            raise FileNotFoundError(f"{ref} is not in the store at {self.address}") from None
        except CorruptOutput as error:
            raise CorruptOutput(f"{error}. {self._remedy(ref)}") from None

    # Building

    def ensure(self, stage: Stage[S], subject: S, lookups: Lookups | None = None, **part: Any) -> Ref:
        """The output's address. A missing output is built first, after the outputs that it reads.

        Two processes that ensure the same output build it once: the second waits for the first.
        Raises what the builder raises, with the stage named, and CorruptOutput for a damaged input.
        """
        lookups = Lookups() if lookups is None else lookups
        for needed, needed_part in stage.inputs(subject, part).values():
            if self.locate(needed, subject, needed_part, lookups).status != "hit":
                self.ensure(needed, subject, lookups, **needed_part)
                lookups.forget_outputs()
        located = self.locate(stage, subject, part, lookups)
        assert located.ref is not None, f"{stage.name}: inputs are built, so the key is known"
        ref = located.ref
        if located.status == "hit":
            with contextlib.suppress(OSError):  # a store that others keep may be read-only, and its outputs still hit
                self._note_use(ref)
            log.info("stage=%s part=%s key=%s status=hit", stage.name, located.name, ref.key)
            return ref
        self.check_writable()
        with self._folders.lock(ref):
            if self.remote:
                self.remote.forget()  # or it misses an output that another machine has built meanwhile
            if not self.has(ref):
                if self.is_here(ref):
                    self.verify(ref)  # an earlier process ended before the upload did
                else:
                    self._build(located, subject, lookups)
                if self._cached:
                    self._cached.publish(ref)
                if self.remote and stage.resumable:
                    self.remote.drop_kept(self.scratch(ref).name)
        lookups.forget_outputs()
        return ref

    def _note_use(self, ref: Ref) -> None:
        """Records that the output is used now, for `sft store gc`."""
        if not self.remote or self.is_here(ref):
            os.utime(self._folders.output(ref))
        if self.remote and self.last_used(ref) < time.time() - USE_NOTED_S:
            self.remote.touch(ref)

    def _build(self, located: Located, subject: S, lookups: Lookups) -> None:
        stage, ref = located.stage, located.ref
        assert ref is not None
        refs = self._input_refs(located, subject, lookups)
        read = stage.needs(subject, located.part)
        inputs = {
            name: self.path(input_ref, *stage.reads.get(input_ref.stage, ()))
            for name, input_ref in refs.items()
            if name in read
        }
        manifests = {name: self.manifest(input_ref) for name, input_ref in refs.items()}
        out = self.scratch(ref)
        if not stage.resumable:
            shutil.rmtree(out, ignore_errors=True)
        elif self._cached:
            self._cached.fetch_kept(ref)
        out.mkdir(parents=True, exist_ok=True)
        log.info("stage=%s part=%s key=%s status=build", stage.name, located.name, ref.key)
        started, by = time.monotonic(), stage.made_by(stage.modules(subject, located.part))
        try:
            manifest = self._finished(ref, out)
            if manifest is None:
                arguments = {**located.identity["section"], **stage.loaders(subject, located.part)}
                upload = functools.partial(self.remote.keep, out.name, out) if self.remote and stage.resumable else None
                counts = stage.build(Build(out, inputs, subject.recipe.runtime, upload, manifests), **arguments)
                files = files_of(out, without=stage.temporary)
                digests = {str(path.relative_to(out)): file_digest(path) for path in files}
                sync([*files, *{folder for path in files for folder in path.parents if folder.is_relative_to(out)}])
                seconds = round(time.monotonic() - started, 3)
                manifest = make_manifest(ref, located.identity, digests, counts, refs, seconds, by)
                # Manifest last, rename after it: a reader must never see half an output.
                write_synced(out / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False))
            remove_matching(out, stage.temporary)  # after the manifest: until then a killed build needs them
            self._folders.put_in_place(out, ref)
        except BaseException as error:
            if not stage.resumable:
                shutil.rmtree(out, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                full = f"no space is left for the store at {self.root}; `sft store gc` frees what is not used"
                error = OSError(error.errno, full).with_traceback(error.__traceback__)
            error.add_note(f"while building {stage.name} {located.name} ({ref})")
            raise error
        try:
            self._journal(located, manifest["seconds"])
        except OSError as error:  # as of a full disk: the output is whole
            log.warning("%s has no line in builds.jsonl: %s", ref, error)
        log.info("stage=%s part=%s key=%s seconds=%.1f", stage.name, located.name, ref.key, manifest["seconds"])

    def _finished(self, ref: Ref, out: Path) -> Manifest | None:
        """The manifest in a folder whose build was killed when it was whole, and not yet in its place."""
        if not (out / MANIFEST).is_file():
            return None
        try:
            manifest = parse_manifest(ref, (out / MANIFEST).read_text(encoding="utf-8", errors="replace"))
            check_files(ref, manifest, manifest["files"], functools.partial(digest_in, out), "")
        except CorruptOutput:
            (out / MANIFEST).unlink()
            return None
        return manifest

    def _input_refs(self, located: Located, subject: S, lookups: Lookups) -> dict[str, Ref]:
        refs = {}
        for name, (stage, part) in located.stage.inputs(subject, located.part).items():
            ref = self.locate(stage, subject, part, lookups).ref
            assert ref is not None, f"{located.stage.name}: {name} is built, so its key is known"
            refs[name] = ref
        return refs

    def _journal(self, located: Located, seconds: float) -> None:
        """Appends one line for a build, at once, so that people and tests can count builds."""
        line = json.dumps(
            {"stage": located.stage.name, "part": located.part, "ref": str(located.ref), "seconds": seconds}
        )
        with (self.root / "builds.jsonl").open("a", encoding="utf-8") as journal:
            journal.write(line + "\n")

    def check_writable(self) -> None:
        """Raises OSError, which says what to do, when the store cannot be written."""
        try:
            (self.root / ".locks").mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root / ".locks") as probe:  # it has no name that a kill could leave
                probe.write(b"x")
        except OSError as error:
            raise OSError(
                error.errno,
                f"the store at {self.root.resolve()} cannot be written ({error.strerror}); "
                f"free space or set {'SFT_CACHE' if self.remote else 'runtime.store'} to a folder that can",
            ) from None
        if self.remote:
            self.remote.check_writable()

    # Looking after

    def verify(self, ref: Ref, *, remote: bool = False) -> None:
        """Raises CorruptOutput for a missing or altered file of the output, and for an altered manifest.

        In a store behind a URL it checks the copy on this machine or, with `remote`, the files behind the URL.
        """
        if self._cached and remote:
            self._cached.verify(ref)
        else:
            self._fetch(ref)
            manifest, digest_of = self.manifest(ref), functools.partial(digest_in, self._folders.output(ref))
            check_files(ref, manifest, manifest["files"], digest_of, self._remedy_here(ref))

    def foreign(self, ref: Ref) -> list[str]:
        """Files in an output's folder on this machine that no builder put there. Nothing reads them."""
        folder = self._folders.output(ref)
        if not folder.is_dir():
            return []
        known = self.manifest(ref)["files"].keys()
        return [name for path in files_of(folder) if (name := str(path.relative_to(folder))) not in known]

    def _remedy(self, ref: Ref) -> str:
        if self._cached:
            return self._cached.remedy(ref)
        return f"Remove it with `sft store gc {ref} --delete`; the next run builds it again."

    def _remedy_here(self, ref: Ref) -> str:
        """For a damaged copy on this machine."""
        if self._cached:
            return f"Remove {self._folders.output(ref)}, the copy here; the next run reads or builds it again."
        return self._remedy(ref)

    def refs(self) -> list[Ref]:
        """Every output, oldest use first."""
        if self.remote:
            used = self.remote.outputs()
            return sorted(used, key=lambda ref: used[ref])
        manifests = self.root.glob(f"[!.]*/*/{MANIFEST}")
        folders = sorted((path.parent for path in manifests), key=lambda folder: folder.stat().st_mtime)
        return [Ref(folder.parent.name, folder.name) for folder in folders]

    def find(self, text: str) -> Ref:
        """The output that `stage/key` or the start of its key names. Raises ValueError when none or several match."""
        stage, _, key = text.rpartition("/")
        refs = [ref for ref in self.refs() if ref.key.startswith(key) and (not stage or ref.stage == stage)]
        if len(refs) != 1:
            outputs = f"{len(refs)} outputs" if refs else "no output"
            raise ValueError(f"{outputs} of the store at {self.address} match {text!r}; `sft store list` shows them")
        return refs[0]

    def num_bytes(self, ref: Ref) -> int:
        if self.remote:
            return self.remote.sizes().get(f"{ref.stage}-{ref.key}", 0)
        return sum(path.stat().st_size for path in files_of(self._folders.output(ref)))

    def last_used(self, ref: Ref) -> float:
        """Seconds since the epoch."""
        return self.remote.outputs()[ref] if self.remote else self._folders.output(ref).stat().st_mtime

    def remove(self, ref: Ref) -> None:
        """Removes the output, behind the URL too. A copy on another machine stays, but no process reads it again."""
        with self._folders.lock(ref):
            if self.remote:
                self.remote.remove(ref)
            self._folders.remove(ref, missing_ok=self.remote is not None)

    def abandoned(self) -> list[Path]:
        """Folders of builds and downloads that no process continues."""
        return self._folders.abandoned()
