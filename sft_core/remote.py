"""What of a store lies behind a URL: an output is there once its manifest is, which is written after its data.

    <url>/outputs/<stage>/<key>/manifest.json   written last; beside it `used`, an empty object written again on use
    <url>/.data/<stage>-<key>/<digest>/...      the files, in a folder named by what is in them
    <url>/.partial/<stage>-<key>/...            what an unfinished build keeps, each folder's digests.json written last

Two builders of one output never write to the same place, unless they write the same bytes: a manifest's files stay
those that it was written for. Each object is whole or absent, as object stores have it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import fsspec
from tqdm import tqdm

from sft_core.digests import DIGESTS, is_whole

if TYPE_CHECKING:
    from sft_core.store import Ref

log = logging.getLogger(__name__)
NUM_TRANSFERS = 8  # files at a time; a shard's files are small, and a request costs more than their bytes
SHOWN_BYTES = 4 * 2**20  # a transfer of fewer shows no bar
_MANIFEST, _USED = "manifest.json", "used"
_PACKAGES = {
    "s3": "'sft-flow[s3]'",
    "s3a": "'sft-flow[s3]'",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "az": "adlfs",
}


class Transfer(NamedTuple):
    source: str
    target: str
    num_bytes: int


class MissingFile(FileNotFoundError):
    """A file that is to be moved is not there; the message has its place."""


class Leftover(NamedTuple):
    """What a build that did not end left behind, or one that lost to another."""

    path: str
    num_bytes: int
    last_used: float


class Remote:
    """The objects below a URL. Every method raises OSError, with the URL and what to do, when it cannot be reached."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        if "@" in url or "?" in url:
            # Not a word of the URL: it would go into logs and terminals.
            raise ValueError(
                "runtime.store: found a URL with credentials or a query in it; it is plain, as s3://bucket/prefix, "
                "and credentials come from the environment"
            )
        self.url = url.rstrip("/")
        protocol = parts.scheme
        try:
            options = {"auto_mkdir": True} if protocol in ("file", "local") else {}
            # Listings that were true once are no answer to whether an output is there.
            self._fs = fsspec.filesystem(protocol, use_listings_cache=False, **options)
        except ImportError as error:
            package = _PACKAGES.get(protocol)
            remedy = f"`pip install {package}`" if package else str(error)
            raise ValueError(f"runtime.store: found {url}; its package is not installed: {remedy}") from None
        except ValueError:
            known = "s3, gs, abfs or another that fsspec knows"
            raise ValueError(f"runtime.store: found {url}; {protocol}:// is unknown, expected {known}") from None
        self._root = self._fs._strip_protocol(self.url).rstrip("/")
        self._listed: dict[tuple[str, str], float] | None = None
        self._sizes: dict[str, int] | None = None
        self._is_writable = False

    @property
    def cache(self) -> Path:
        """The local folder where outputs are made and read. SFT_CACHE moves it; it is part of no identity."""
        base = os.environ.get("SFT_CACHE") or "~/.cache/sft-flow"
        return Path(base).expanduser() / hashlib.sha256(self.url.encode()).hexdigest()[:12]

    # What is there

    def outputs(self) -> dict[tuple[str, str], float]:
        """(stage, key) of every output, with the time of its last use; listed once, until `forget`."""
        if self._listed is None:
            there: dict[tuple[str, str], float] = {}
            used: dict[tuple[str, str], float] = {}
            for path, info in self._find("outputs").items():
                *ref, name = path.split("/")
                if len(ref) == 2 and name in (_MANIFEST, _USED):  # consoles leave objects that stand for folders
                    (there if name == _MANIFEST else used)[ref[0], ref[1]] = _modified(info)
            self._listed = {ref: max(written, used.get(ref, 0.0)) for ref, written in there.items()}
        return self._listed

    def forget(self) -> None:
        """The next question is answered by what is there then."""
        self._listed = self._sizes = None

    def sizes(self) -> dict[str, int]:
        """Bytes of the files of each `<stage>-<key>`, finished or not; listed once, until `forget`."""
        if self._sizes is None:
            self._sizes = {}
            for path, info in self._find(".data").items():
                name = path.split("/")[0]
                self._sizes[name] = self._sizes.get(name, 0) + info["size"]
        return self._sizes

    def leftovers(self) -> list[Leftover]:
        """Data that no manifest stands for, and what unfinished builds have kept."""
        whole = {f"{stage}-{key}" for stage, key in self.outputs()}
        found: dict[str, list[dict[str, Any]]] = {}
        for top in (".data", ".partial"):
            for path, info in self._find(top).items():
                name = path.split("/")[0]
                if top == ".partial" or name not in whole:
                    found.setdefault(f"{top}/{name}", []).append(info)
        return [
            Leftover(path, sum(info["size"] for info in infos), max(map(_modified, infos)))
            for path, infos in found.items()
        ]

    def read(self, ref: Ref) -> str:
        """The manifest's text."""
        with self._reached():
            return self._fs.cat_file(self._manifest(ref), start=0).decode()  # with a start s3fs asks for no size first

    def open(self, ref: Ref, digest: str, name: str) -> IO[bytes]:
        """A file of an output where it is: only what is read of it is fetched."""
        with self._reached():
            return self._fs.open(f"{self._data(ref, digest)}/{name}", "rb")

    def digest_of(self, ref: Ref, digest: str, name: str) -> dict[str, Any] | None:
        """Size and SHA-256 of a file as its manifest has them, read through once; None when it is missing."""
        try:
            with self._reached(), self._fs.open(f"{self._data(ref, digest)}/{name}", "rb") as file:
                return {"bytes": file.size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        except FileNotFoundError:
            return None

    # What comes and goes

    def publish(self, ref: Ref, folder: Path, files: dict[str, dict[str, Any]], digest: str) -> bool:
        """Uploads an output, manifest last. False when another builder's manifest is there: that one stands."""
        data = self._data(ref, digest)
        wanted = [Transfer(f"{folder}/{name}", f"{data}/{name}", entry["bytes"]) for name, entry in files.items()]
        self._move(f"upload {ref}", wanted, self._fs.put_file)
        with self._reached():
            try:
                self._fs.pipe_file(self._manifest(ref), (folder / _MANIFEST).read_bytes(), mode="create")
            except OSError:  # stores have different words for a condition that does not hold
                if not self._fs.exists(self._manifest(ref)):
                    raise
                return False
        if self._listed is not None:
            self._listed[ref] = time.time()
        self._sizes = None
        return True

    def download(self, ref: Ref, folder: Path, files: dict[str, dict[str, Any]], digest: str) -> None:
        """The files of an output into a folder, as they are: the caller compares them with the manifest."""
        data = self._data(ref, digest)
        wanted = [Transfer(f"{data}/{name}", f"{folder}/{name}", entry["bytes"]) for name, entry in files.items()]
        self._fetch(f"download {ref}", wanted)

    def touch(self, ref: Ref) -> None:
        """Notes a use, for gc."""
        with self._reached():
            self._fs.pipe_file(f"{self._root}/outputs/{ref.stage}/{ref.key}/{_USED}", b"")

    def remove(self, ref: Ref) -> None:
        # The manifest first: what is left of a half-removed output is none.
        self._remove(f"outputs/{ref.stage}/{ref.key}", first=_MANIFEST)
        self._remove(f".data/{ref.stage}-{ref.key}")
        self.forget()

    def remove_data(self, ref: Ref, digest: str) -> None:
        """Removes the data of a builder that lost the race for an output."""
        self._remove(f".data/{ref.stage}-{ref.key}/{digest}")

    def remove_leftover(self, leftover: Leftover) -> None:
        self._remove(leftover.path)

    def check_writable(self) -> None:
        """Raises OSError unless an object can be written and removed; asked once."""
        if self._is_writable:
            return
        probe = f"{self._root}/.probe-{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
        with self._reached("written"):
            self._fs.pipe_file(probe, b"x")
            self._fs.rm_file(probe)
        self._is_writable = True

    # What unfinished builds keep

    def keep(self, name: str, out: Path, folder: Path) -> None:
        """Uploads a finished folder below `out`, its digests.json last, and drops kept ones that are gone from `out`.

        A folder that is removed meanwhile is not kept: a newer one is on its way.
        """
        where = f".partial/{name}/{folder.resolve().relative_to(out.resolve()).as_posix()}"
        kept = self._kept(name)
        for relative in kept:
            if not (out / relative).exists():
                self._remove(f".partial/{name}/{relative}", first=DIGESTS)
        self._remove(where, first=DIGESTS)  # of an earlier attempt: its digests would stand for other bytes
        try:
            files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file != folder / DIGESTS]
            wanted = [_upload(file, f"{self._root}/{where}/{file.relative_to(folder).as_posix()}") for file in files]
            self._move(f"keep {name}", wanted, self._fs.put_file)
            self._move("", [_upload(folder / DIGESTS, f"{self._root}/{where}/{DIGESTS}")], self._fs.put_file)
        except OSError:
            if folder.exists():
                raise
            self._remove(where, first=DIGESTS)
            log.info("kept=%s status=gone", folder.name)
            return
        log.info("kept=%s bytes=%d", folder.name, sum(one.num_bytes for one in wanted))

    def fetch_kept(self, name: str, out: Path) -> None:
        """Downloads into `out` every kept folder that is whole; a damaged one is passed over, loudly."""
        for relative, infos in self._kept(name).items():
            base = f"{self._root}/.partial/{name}/{relative}"
            wanted = [Transfer(f"{base}/{file}", str(out / relative / file), info["size"]) for file, info in infos]
            self._fetch(f"fetch {name}", wanted)
            if is_whole(out / relative):
                log.info("kept=%s status=fetched", relative)
            else:
                log.warning("kept=%s is damaged and passed over", relative)
                shutil.rmtree(out / relative)

    def drop_kept(self, name: str) -> None:
        self._remove(f".partial/{name}", first=DIGESTS)

    def _kept(self, name: str) -> dict[str, list[tuple[str, dict[str, Any]]]]:
        """The files of each kept folder that has its digests, by the folder's place."""
        found = self._find(f".partial/{name}")
        folders = [path.rpartition("/")[0] for path in found if path.rpartition("/")[2] == DIGESTS]
        return {
            folder: [(path[len(folder) + 1 :], info) for path, info in found.items() if path.startswith(f"{folder}/")]
            for folder in folders
        }

    # Objects

    def _manifest(self, ref: Ref) -> str:
        return f"{self._root}/outputs/{ref.stage}/{ref.key}/{_MANIFEST}"

    def _data(self, ref: Ref, digest: str) -> str:
        return f"{self._root}/.data/{ref.stage}-{ref.key}/{digest}"

    def _find(self, below: str) -> dict[str, dict[str, Any]]:
        """What is known of each object below a place, by its name from there."""
        base = f"{self._root}/{below}"
        with self._reached():
            found = self._fs.find(base, detail=True)
        return {path[len(base) + 1 :]: info for path, info in found.items() if path.startswith(f"{base}/")}

    def _remove(self, below: str, first: str | None = None) -> None:
        names = [f"{self._root}/{below}/{name}" for name in self._find(below)]
        firsts = [name for name in names if name.rpartition("/")[2] == first]
        with self._reached("written"):
            _each(self._fs.rm_file, firsts)
            _each(self._fs.rm_file, [name for name in names if name not in firsts])

    def _fetch(self, what: str, wanted: list[Transfer]) -> None:
        for one in wanted:
            Path(one.target).parent.mkdir(parents=True, exist_ok=True)
        self._move(what, wanted, self._fs.get_file)

    def _move(self, what: str, wanted: list[Transfer], move: Callable[..., None]) -> None:
        total = sum(one.num_bytes for one in wanted)
        hidden = True if total < SHOWN_BYTES else None
        with self._reached(), tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=hidden) as bar:
            progress = _Progress(bar)

            def move_one(one: Transfer) -> None:
                try:
                    move(one.source, one.target, callback=progress)
                except FileNotFoundError:
                    raise MissingFile(f"{one.source} is missing") from None

            _each(move_one, wanted)

    @contextlib.contextmanager
    def _reached(self, what: str = "reached") -> Iterator[None]:
        try:
            yield
        except MissingFile:
            raise
        except Exception as error:  # each protocol has errors of its own, and few are OSErrors
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise  # of the disk here
            kind = type(error) if isinstance(error, FileNotFoundError | PermissionError) else OSError
            told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise kind(
                f"the store at {self.url} cannot be {what} ({told}); check runtime.store, the network, and the "
                "credentials in the environment"
            ) from error


class _Progress(fsspec.Callback):
    def __init__(self, bar: tqdm):
        super().__init__()
        self.bar = bar

    def relative_update(self, inc: int = 1) -> None:
        self.bar.update(inc)


def _each(do: Callable[[Any], None], items: Sequence[Any]) -> None:
    """Several at a time; the first error ends it, and what has not begun does not begin."""
    pool = ThreadPoolExecutor(NUM_TRANSFERS)
    try:
        for _ in pool.map(do, items):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def _upload(file: Path, target: str) -> Transfer:
    return Transfer(str(file), target, file.stat().st_size)


def _modified(info: dict[str, Any]) -> float:
    """Seconds since the epoch, under the names that the protocols have for it."""
    names = ("LastModified", "mtime", "last_modified", "updated", "modified", "created")
    value = next(info[name] for name in names if info.get(name) is not None)
    return value if isinstance(value, int | float) else value.timestamp()
