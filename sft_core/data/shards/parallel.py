"""Work on a source in shards, over all cores: each shard is a folder, whole or absent, so a killed build goes on.

A shard covers some row groups of the source's conversations. The number of row groups alone decides which, so neither
the cores nor a restart changes the bytes.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import gc
import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from sft_core.die_with_parent import die_with_parent

if TYPE_CHECKING:
    from sft_core.recipe.sections import Runtime

log = logging.getLogger(__name__)
MAX_SHARDS = 64  # of a source: readers hold a file of each open. A source of too many row groups has more
MAX_GROUPS = 100  # row groups of a shard: a kill loses as many


class Shard(NamedTuple):
    """Row groups first_group to end_group (exclusive) of the source's conversations."""

    number: int
    first_group: int
    end_group: int


Tally = Mapping[str, int | Mapping[str, int]]  # counts of a shard: numbers, or numbers by name
Work = Callable[[Shard, Path], Tally]  # writes a shard's files into a folder, and counts


def plan_shards(num_groups: int) -> list[Shard]:
    """Shards of equal numbers of row groups, but for the last.

    >>> [shard.end_group for shard in plan_shards(3)]
    [1, 2, 3]
    """
    size = min(MAX_GROUPS, max(1, math.ceil(num_groups / MAX_SHARDS)))
    starts = range(0, num_groups, size)
    return [Shard(number, start, min(start + size, num_groups)) for number, start in enumerate(starts)]


def shard_folder(out: Path, shard: Shard) -> Path:
    return out / f"shard-{shard.number:05}"


def shard_folders(folder: Path) -> list[Path]:
    """The shards of an output, in order."""
    return sorted(folder.glob("shard-*"))


def build_shards(
    out: Path, shards: list[Shard], work: Callable[[], Work], *, runtime: Runtime, desc: str
) -> list[Tally]:
    """The tally of each shard, in order. Shards that are in `out` already are not made again.

    work: called once in each process, to load what its shards share (a tokenizer); it must be picklable.
    Raises the errors of the work; finished shards stay.
    """
    for unfinished in out.glob(".unfinished-*"):
        shutil.rmtree(unfinished)
    missing = [shard for shard in shards if not shard_folder(out, shard).exists()]
    if len(missing) < len(shards):
        log.info("%s: shards_kept=%d shards_to_make=%d", desc, len(shards) - len(missing), len(missing))
    num_workers = min(runtime.num_workers or os.cpu_count() or 1, len(missing))
    with tqdm(total=len(shards), initial=len(shards) - len(missing), unit=" shards", disable=None, desc=desc) as bar:
        for _ in _run(out, missing, work, num_workers):
            bar.update()
    return [json.loads((shard_folder(out, shard) / "counts.json").read_text()) for shard in shards]


def total(tallies: Sequence[Tally]) -> dict[str, Any]:
    """The sums of tallies by name. Numbers by name are summed by their names; sums of 0 are left out of those."""
    sums: dict[str, Any] = {}
    for tally in tallies:
        for name, value in tally.items():
            if isinstance(value, Mapping):
                sums[name] = dict(sorted((Counter(sums.get(name, {})) + Counter(value)).items()))
            else:
                sums[name] = sums.get(name, 0) + value
    return sums


def _run(out: Path, shards: list[Shard], work: Callable[[], Work], num_workers: int) -> Iterator[None]:
    if num_workers <= 1:
        if shards:
            here = work()
            with _without_garbage_search():
                for shard in shards:
                    _build_shard(out, shard, here)
                    yield
        return
    if sys.platform == "linux":
        # Forked workers share what is loaded. Forking is safe: no thread runs here that could hold a lock.
        context, ready = "fork", functools.partial(_same, work())
    else:
        context, ready = "spawn", work
    pool = concurrent.futures.ProcessPoolExecutor(
        num_workers, multiprocessing.get_context(context), initializer=_start_worker, initargs=(ready,)
    )
    with _without_garbage_search():
        try:
            waiting = {pool.submit(_build_in_worker, out, shard) for shard in shards}
            for done in concurrent.futures.as_completed(waiting):
                yield done.result()
        except BrokenProcessPool as error:
            error.add_note(
                "a worker process was killed, perhaps for want of memory: lower runtime.num_workers; the shards that "
                "are done stay"
            )
            raise
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _without_garbage_search() -> Iterator[None]:
    """Garbage collection skips all objects that exist by now: visiting them takes a tenth of the time, and makes a
    forked worker copy the memory that it shares."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


_work: Work  # of this worker process


def _same(work: Work) -> Work:
    return work


def _start_worker(work: Callable[[], Work]) -> None:
    global _work
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent alone reports an interrupt
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    _work = work()


def _build_in_worker(out: Path, shard: Shard) -> None:
    _build_shard(out, shard, _work)


def _build_shard(out: Path, shard: Shard, work: Work) -> None:
    unfinished = out / f".unfinished-{shard.number:05}"
    unfinished.mkdir()
    counts = work(shard, unfinished)
    (unfinished / "counts.json").write_text(json.dumps(counts))
    # Rename last: the folder of a killed build must not look like a shard.
    unfinished.rename(shard_folder(out, shard))
