"""Remote: the objects of a store behind a URL. An output is there once its manifest is, which is written last.

    <url>/outputs/<stage>/<key>/manifest.json   written last; beside it `used`, an empty object written again on use
    <url>/.data/<stage>-<key>/<digest>/...      the files, in a folder named by their digest
    <url>/.partial/<stage>-<key>/...            folders that an unfinished build keeps, each digests.json written last

Two builders of one output write to different folders unless they write the same bytes, so no builder overwrites files
of another's manifest. Object stores guarantee that each object is whole or absent.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

import fsspec
from tqdm import tqdm

from sft_core.store.digests import DIGESTS, hex_digests, is_whole
from sft_core.store.folders import cache_folder
from sft_core.store.manifest import MANIFEST, FileDigest
from sft_core.store.ref import Ref

log = logging.getLogger(__name__)
NUM_TRANSFERS = 8  # files at a time: a shard's files are small, and a request costs more than their bytes
SHOWN_BYTES = 4 * 2**20  # a transfer of fewer bytes shows no bar
_USED = "used"
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
    """The source of a transfer is not there; the message names it."""


class StoredObject(NamedTuple):
    """An object in a listing."""

    num_bytes: int
    last_modified: float  # seconds since the epoch


class Leftover(NamedTuple):
    """Objects of a build that did not end, or that lost against another build of the same output."""

    path: str
    num_bytes: int
    last_used: float


class Remote:
    """The objects below a URL. Every method raises OSError, with the URL and what to do, when it cannot be reached."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        if "@" in url or "?" in url:
            # The message leaves out the URL: its credentials would go into logs and terminals.
            raise ValueError(
                "runtime.store: found a URL with credentials or a query in it; it is plain, as s3://bucket/prefix, "
                "and credentials come from the environment"
            )
        self.url = url.rstrip("/")
        protocol = parts.scheme
        try:
            options = {"auto_mkdir": True} if protocol in ("file", "local") else {}
            # A cached listing would miss the outputs that other machines have built since.
            self._fs = fsspec.filesystem(protocol, use_listings_cache=False, **options)
        except ImportError as error:
            package = _PACKAGES.get(protocol)
            remedy = f"`pip install {package}`" if package else str(error)
            raise ValueError(f"runtime.store: found {url}; its package is not installed: {remedy}") from None
        except ValueError:
            known = "s3, gs, abfs or another that fsspec knows"
            raise ValueError(f"runtime.store: found {url}; {protocol}:// is unknown, expected {known}") from None
        self._root = self._fs._strip_protocol(self.url).rstrip("/")
        self._last_uses: dict[Ref, float] | None = None
        self._sizes: dict[str, int] | None = None
        self._is_writable = False

    @property
    def cache(self) -> Path:
        """The local folder in which outputs are built and read."""
        return cache_folder() / hashlib.sha256(self.url.encode()).hexdigest()[:12]

    # Listing

    def outputs(self) -> dict[Ref, float]:
        """When each output was last used, in seconds since the epoch; listed once, until `forget`."""
        if self._last_uses is None:
            times: dict[str, dict[Ref, float]] = {MANIFEST: {}, _USED: {}}
            for path, stored in self._find("outputs").items():
                *ref, name = path.split("/")
                if len(ref) == 2 and name in times:  # consoles make objects that stand for folders
                    times[name][Ref(*ref)] = stored.last_modified
            used = times[_USED]
            self._last_uses = {ref: max(written, used.get(ref, 0.0)) for ref, written in times[MANIFEST].items()}
        return self._last_uses

    def forget(self) -> None:
        """Forgets the listings: `outputs` and `sizes` list again."""
        self._last_uses = self._sizes = None

    def sizes(self) -> dict[str, int]:
        """Bytes of the files of each `<stage>-<key>`, finished or not; listed once, until `forget`."""
        if self._sizes is None:
            self._sizes = {}
            for path, stored in self._find(".data").items():
                name = path.split("/")[0]
                self._sizes[name] = self._sizes.get(name, 0) + stored.num_bytes
        return self._sizes

    def leftovers(self) -> list[Leftover]:
        """Data without a manifest, and folders that unfinished builds have kept."""
        whole = {f"{stage}-{key}" for stage, key in self.outputs()}
        objects_by_path: dict[str, list[StoredObject]] = {}
        for top in (".data", ".partial"):
            for path, stored in self._find(top).items():
                name = path.split("/")[0]
                if top == ".partial" or name not in whole:
                    objects_by_path.setdefault(f"{top}/{name}", []).append(stored)
        return [
            Leftover(path, sum(stored.num_bytes for stored in objects), max(stored.last_modified for stored in objects))
            for path, objects in objects_by_path.items()
        ]

    def read(self, ref: Ref) -> str:
        """The manifest's text."""
        with self._reached():
            return self._fs.cat_file(self._manifest(ref), start=0).decode()  # with a start s3fs asks for no size first

    def open(self, ref: Ref, digest: str, name: str) -> IO[bytes]:
        """A file of an output, open behind the URL: only the part that is read is fetched."""
        with self._reached():
            return self._fs.open(f"{self._data(ref, digest)}/{name}", "rb")

    def digest_of(self, ref: Ref, data: str, name: str, algorithm: str) -> tuple[int, str] | None:
        """Size and digest of a file; None when it is missing. It reads the whole file."""
        try:
            with self._reached(), self._fs.open(f"{self._data(ref, data)}/{name}", "rb") as file:
                return file.size, hex_digests(file, [algorithm])[algorithm]
        except FileNotFoundError:
            return None

    # Moving and removing

    def publish(self, ref: Ref, folder: Path, files: dict[str, FileDigest], digest: str) -> bool:
        """Uploads an output, manifest last. False when another builder's manifest is there, which stays."""
        data = self._data(ref, digest)
        transfers = [Transfer(f"{folder}/{name}", f"{data}/{name}", entry["bytes"]) for name, entry in files.items()]
        self._move(f"upload {ref}", transfers, self._fs.put_file)
        with self._reached():
            try:
                self._fs.pipe_file(self._manifest(ref), (folder / MANIFEST).read_bytes(), mode="create")
            except OSError:  # each protocol has another error for a manifest that is there already
                if not self._fs.exists(self._manifest(ref)):
                    raise
                return False
        if self._last_uses is not None:
            self._last_uses[ref] = time.time()
        self._sizes = None
        return True

    def download(self, ref: Ref, folder: Path, files: dict[str, FileDigest], digest: str) -> None:
        """Downloads the files of an output into a folder. The caller compares them with the manifest."""
        data = self._data(ref, digest)
        transfers = [Transfer(f"{data}/{name}", f"{folder}/{name}", entry["bytes"]) for name, entry in files.items()]
        self._fetch(f"download {ref}", transfers)

    def touch(self, ref: Ref) -> None:
        """Records a use of the output now, for `sft store gc`."""
        with self._reached():
            self._fs.pipe_file(f"{self._root}/outputs/{ref.stage}/{ref.key}/{_USED}", b"")

    def remove(self, ref: Ref) -> None:
        # The manifest first: the rest of a killed removal must not be an output.
        self._remove(f"outputs/{ref.stage}/{ref.key}", first=MANIFEST)
        self._remove(f".data/{ref.stage}-{ref.key}")
        self.forget()

    def remove_data(self, ref: Ref, digest: str) -> None:
        """Removes the data of a build that lost against another build of the same output."""
        self._remove(f".data/{ref.stage}-{ref.key}/{digest}")

    def remove_leftover(self, leftover: Leftover) -> None:
        self._remove(leftover.path)

    def check_writable(self) -> None:
        """Raises OSError unless an object can be written and removed. Tries it once."""
        if self._is_writable:
            return
        probe = f"{self._root}/.probe"  # one name for all processes: those that are killed here leave one object
        with self._reached("written"):
            self._fs.pipe_file(probe, b"x")
            with contextlib.suppress(FileNotFoundError):  # another process may have removed it
                self._fs.rm_file(probe)
        self._is_writable = True

    # Folders that unfinished builds keep

    def keep(self, name: str, out: Path, folder: Path) -> None:
        """Uploads a finished folder below `out`, its digests.json last, then removes kept folders that `out` lost.

        In this order a whole kept folder is there at any time. A folder that is removed during its upload is not kept:
        a newer one replaces it.
        """
        where = f".partial/{name}/{folder.resolve().relative_to(out.resolve()).as_posix()}"
        self._remove(where, first=DIGESTS)  # an earlier attempt's digests would stand for other bytes
        try:
            files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file != folder / DIGESTS]
            base = f"{self._root}/{where}"
            transfers = [_upload(file, f"{base}/{file.relative_to(folder).as_posix()}") for file in files]
            self._move(f"keep {name}", transfers, self._fs.put_file)
            self._move("", [_upload(folder / DIGESTS, f"{base}/{DIGESTS}")], self._fs.put_file)
        except OSError:
            if folder.exists():
                raise
            self._remove(where, first=DIGESTS)
            log.info("kept=%s status=gone", folder.name)
            return
        log.info("kept=%s bytes=%d", folder.name, sum(transfer.num_bytes for transfer in transfers))
        for relative in self.kept(name):
            if not (out / relative).exists() and f".partial/{name}/{relative}" != where:
                self._remove(f".partial/{name}/{relative}", first=DIGESTS)

    def fetch_kept(self, name: str, out: Path) -> None:
        """Downloads every whole kept folder into `out`. Damaged ones are left out, with a warning."""
        for relative, sizes in self.kept(name).items():
            base = f"{self._root}/.partial/{name}/{relative}"
            transfers = [Transfer(f"{base}/{file}", str(out / relative / file), size) for file, size in sizes.items()]
            self._fetch(f"fetch {name}", transfers)
            if is_whole(out / relative):
                log.info("kept=%s status=fetched", relative)
            else:
                log.warning("kept=%s is damaged and left out", relative)
                shutil.rmtree(out / relative)

    def drop_kept(self, name: str) -> None:
        self._remove(f".partial/{name}", first=DIGESTS)

    def kept(self, name: str) -> dict[str, dict[str, int]]:
        """{folder: {file: bytes}} of the kept folders that have their digests.json. folder: its path below `out`."""
        objects = self._find(f".partial/{name}")
        folders = [path.rpartition("/")[0] for path in objects if path.rpartition("/")[2] == DIGESTS]
        return {
            folder: {
                path[len(folder) + 1 :]: stored.num_bytes
                for path, stored in objects.items()
                if path.startswith(f"{folder}/")
            }
            for folder in folders
        }

    # Objects

    def _manifest(self, ref: Ref) -> str:
        return f"{self._root}/outputs/{ref.stage}/{ref.key}/{MANIFEST}"

    def _data(self, ref: Ref, digest: str) -> str:
        return f"{self._root}/.data/{ref.stage}-{ref.key}/{digest}"

    def _find(self, below: str) -> dict[str, StoredObject]:
        """The objects below a folder, by their paths from that folder."""
        base = f"{self._root}/{below}"
        with self._reached():
            infos = self._fs.find(base, detail=True)
        return {
            path[len(base) + 1 :]: StoredObject(info["size"], _last_modified(info))
            for path, info in infos.items()
            if path.startswith(f"{base}/")
        }

    def _remove(self, below: str, first: str | None = None) -> None:
        names = [f"{self._root}/{below}/{name}" for name in self._find(below)]
        firsts = [name for name in names if name.rpartition("/")[2] == first]
        with self._reached("written"):
            _each(self._fs.rm_file, firsts)
            _each(self._fs.rm_file, [name for name in names if name not in firsts])

    def _fetch(self, title: str, transfers: list[Transfer]) -> None:
        for transfer in transfers:
            Path(transfer.target).parent.mkdir(parents=True, exist_ok=True)
        self._move(title, transfers, self._fs.get_file)

    def _move(self, title: str, transfers: list[Transfer], move: Callable[..., None]) -> None:
        """Moves files with put_file or get_file under one bar of bytes. Raises MissingFile for a source that is gone.

        `fs.put` and `fs.get` with lists and fsspec's TqdmCallback would be shorter, and worse (tried with s3fs 2026.9):
        the bar counts files, so it stands at 0 while a checkpoint's one large file moves; the error for a missing
        object is "The specified key does not exist." without the key; after an error, coroutines that never ran print
        warnings; and file:// moves one file at a time.
        """
        total = sum(transfer.num_bytes for transfer in transfers)
        hidden = True if total < SHOWN_BYTES else None
        with self._reached(), tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=hidden) as bar:
            progress = _Progress(bar)

            def move_one(transfer: Transfer) -> None:
                try:
                    move(transfer.source, transfer.target, callback=progress)
                except FileNotFoundError:
                    raise MissingFile(f"{transfer.source} is missing") from None

            _each(move_one, transfers)

    @contextlib.contextmanager
    def _reached(self, verb: str = "reached") -> Iterator[None]:
        """Errors of the protocol become OSErrors with the URL and what to do."""
        try:
            yield
        except MissingFile:
            raise
        except Exception as error:  # each protocol has its own errors, and few of them are OSErrors
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise  # this machine's disk is full
            kind = type(error) if isinstance(error, FileNotFoundError | PermissionError) else OSError
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise kind(
                f"the store at {self.url} cannot be {verb} ({reason}); check runtime.store, the network, and the "
                "credentials in the environment"
            ) from error


class _Progress(fsspec.Callback):
    """Adds the bytes of several files to one bar. fsspec's TqdmCallback takes each file's size for the bar's total."""

    def __init__(self, bar: tqdm):
        super().__init__()
        self.bar = bar

    def relative_update(self, inc: int = 1) -> None:
        self.bar.update(inc)


def _each(do: Callable[[Any], None], items: Sequence[Any]) -> None:
    """Calls `do` for several items at a time. After the first error it starts no more of them, and raises it."""
    pool = ThreadPoolExecutor(NUM_TRANSFERS)
    try:
        for _ in pool.map(do, items):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def _upload(file: Path, target: str) -> Transfer:
    return Transfer(str(file), target, file.stat().st_size)


def _last_modified(info: Mapping[str, Any]) -> float:
    """Seconds since the epoch. info: fsspec's; each protocol calls the time otherwise."""
    names = ("LastModified", "mtime", "last_modified", "updated", "modified", "created")
    value = next(info[name] for name in names if info.get(name) is not None)
    return value if isinstance(value, int | float) else value.timestamp()
