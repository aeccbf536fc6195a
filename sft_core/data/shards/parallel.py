"""Work on a source in shards, over all cores: each shard is a folder, whole or absent, so a killed build goes on.

A shard covers some row groups of the source's conversations. Which ones is a function of their number alone: neither
the cores nor a restart changes what is written.
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
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from sft_core.die_with_parent import die_with_parent

if TYPE_CHECKING:
    from sft_core.recipe.sections import Runtime

log = logging.getLogger(__name__)
MAX_SHARDS = 64  # a source's, while its row groups are not too many: readers hold a file open for each
MAX_GROUPS = 100  # of a shard: what a kill can cost


class Shard(NamedTuple):
    """Row groups first_group to end_group (exclusive) of the source's conversations."""

    number: int
    first_group: int
    end_group: int


Work = Callable[[Shard, Path], dict[str, Any]]  # writes a shard's files into a folder and counts what it did


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
) -> list[dict[str, Any]]:
    """What `work()` counts for each shard, in order. Shards that stand in `out` already are not made again.

    work: called once in each process, for what all of its shards share (a tokenizer); it must be picklable.
    Raises what the work raises; shards that are done by then stay.
    """
    for left in out.glob(".unfinished-*"):
        shutil.rmtree(left)
    missing = [shard for shard in shards if not shard_folder(out, shard).exists()]
    if len(missing) < len(shards):
        log.info("%s: shards_kept=%d shards_to_make=%d", desc, len(shards) - len(missing), len(missing))
    num_workers = min(runtime.num_workers or os.cpu_count() or 1, len(missing))
    with tqdm(total=len(shards), initial=len(shards) - len(missing), unit=" shards", disable=None, desc=desc) as bar:
        for _ in _run(out, missing, work, num_workers):
            bar.update()
    return [json.loads((shard_folder(out, shard) / "counts.json").read_text()) for shard in shards]


def total(counts: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum of counts by name; a mapping of counts is summed by its own names."""
    summed: dict[str, Any] = {}
    for one in counts:
        for name, value in one.items():
            if isinstance(value, dict):
                summed[name] = dict(sorted((Counter(summed.get(name, {})) + Counter(value)).items()))
            else:
                summed[name] = summed.get(name, 0) + value
    return summed


def _run(out: Path, shards: list[Shard], work: Callable[[], Work], num_workers: int) -> Iterator[None]:
    if num_workers <= 1:
        if shards:
            one = work()
            with _left_alone():
                for shard in shards:
                    _make(out, shard, one)
                    yield
        return
    if sys.platform == "linux":
        # Forked workers share what is loaded already. Nothing here runs threads that could hold a lock meanwhile.
        context, ready = "fork", functools.partial(_same, work())
    else:
        context, ready = "spawn", work
    pool = concurrent.futures.ProcessPoolExecutor(
        num_workers, multiprocessing.get_context(context), initializer=_start, initargs=(ready,)
    )
    with _left_alone():
        try:
            waiting = {pool.submit(_make_in_worker, out, shard) for shard in shards}
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
def _left_alone() -> Iterator[None]:
    """What is loaded by now is not looked through for garbage: that takes a tenth of the time, and a forked worker
    would get a copy of all that it shares."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


_work: Work  # of this worker process


def _same(work: Work) -> Work:
    return work


def _start(work: Callable[[], Work]) -> None:
    global _work
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells of an interrupt, once
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    _work = work()


def _make_in_worker(out: Path, shard: Shard) -> None:
    _make(out, shard, _work)


def _make(out: Path, shard: Shard, work: Work) -> None:
    unfinished = out / f".unfinished-{shard.number:05}"
    unfinished.mkdir()
    counts = work(shard, unfinished)
    (unfinished / "counts.json").write_text(json.dumps(counts))
    # Rename last: what a killed build left must not look like a shard.
    unfinished.rename(shard_folder(out, shard))
