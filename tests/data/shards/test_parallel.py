"""Work in shards: what is done stays done, whoever is killed; neither workers nor restarts change what is written."""

import functools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_core.data.shards.parallel import MAX_GROUPS, MAX_SHARDS, Shard, build_shards, plan_shards, shard_folders
from sft_core.data.tokens import build as tokens
from sft_core.pins.pinned import PinnedRecipe
from sft_core.recipe.sections import Runtime
from sft_core.store.store import Store
from steps.render import RENDERED
from steps.tokenize import TOKENS

NUM_SHARDS, NUM_WORKERS = 6, 2


# A killed build


@pytest.fixture
def recipe(write_rows: Callable, pinned: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], PinnedRecipe]:
    monkeypatch.setattr("sft_core.data.sources.read.ROWS_A_GROUP", 20)

    def talk(number: int) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": "Yes."}]}

    path = write_rows("rows.jsonl", [talk(number) for number in range(20 * NUM_SHARDS)])
    source = {"name": "rows", "path": str(path)}
    return lambda num_workers: pinned(source, runtime={"num_workers": num_workers})


def stuck_when_two_shards_are_done(scratch: Path, encode_rows: Callable, *args: Any) -> Any:
    while len(shard_folders(scratch)) >= 2:
        time.sleep(0.01)
    return encode_rows(*args)


def ensure_tokens(store: Store, recipe: PinnedRecipe, scratch: Path) -> None:
    os.setsid()
    # In this process and its workers alone: they are killed at a moment that is known, in the middle of a shard.
    tokens.encode_rows = functools.partial(stuck_when_two_shards_are_done, scratch, tokens.encode_rows)
    store.ensure(TOKENS, recipe, source="rows")


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Which files they are and when they were written."""
    found = (path for shard in shard_folders(folder) for path in shard.iterdir())
    return {f"{path.parent.name}/{path.name}": (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


@pytest.mark.slow
@pytest.mark.parametrize("kill", [os.kill, os.killpg], ids=["only the parent", "the whole group"])
def test_killed_build_goes_on_from_the_shards_that_are_done(kill: Callable, recipe: Callable, tmp_path: Path):
    store = Store(tmp_path / "store")
    store.ensure(RENDERED, recipe(1), source="rows")
    located = store.locate(TOKENS, recipe(NUM_WORKERS), {"source": "rows"})
    scratch = store.scratch(located.ref)
    builder = multiprocessing.get_context("fork").Process(
        target=ensure_tokens, args=(store, recipe(NUM_WORKERS), scratch)
    )
    builder.start()
    wait_until(lambda: len(shard_folders(scratch)) >= 2 and len(list(scratch.glob(".unfinished-*"))) == NUM_WORKERS)
    workers = psutil.Process(builder.pid).children(recursive=True)
    assert len(workers) == NUM_WORKERS
    kill(builder.pid, signal.SIGKILL)
    builder.join()
    _, orphans = psutil.wait_procs(workers, timeout=5)
    for orphan in orphans:
        orphan.kill()
    assert not orphans, "workers outlive the one that started them"

    kept = files_of(scratch)
    unfinished = list(scratch.glob(".unfinished-*"))
    num_done = len(shard_folders(scratch))
    assert 2 <= num_done <= NUM_SHARDS - NUM_WORKERS
    assert 0 < len(unfinished) <= NUM_WORKERS, "each worker loses one shard at most"
    ref = store.ensure(TOKENS, recipe(NUM_WORKERS), source="rows")
    made = files_of(store.path(ref))
    assert {name: made[name] for name in kept} == kept
    assert len(shard_folders(store.path(ref))) == NUM_SHARDS
    assert not list(store.path(ref).glob(".*"))

    undisturbed = Store(tmp_path / "undisturbed")
    alone = undisturbed.ensure(TOKENS, recipe(1), source="rows")
    assert alone == ref, "runtime is no part of an identity"
    assert undisturbed.manifest(alone)["files"] == store.manifest(ref)["files"]
    assert undisturbed.manifest(alone)["counts"] == store.manifest(ref)["counts"]


def wait_until(holds: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Workers that fail


def work_on(faults: dict[int, str]) -> Callable[[Shard, Path], dict[str, Any]]:
    return functools.partial(work, faults)


def work(faults: dict[int, str], shard: Shard, out: Path) -> dict[str, Any]:
    (out / "rows.txt").write_text(f"{shard.first_group}-{shard.end_group}")
    fault = faults.get(shard.number)
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault:
        raise ValueError(fault)
    return {"first_group": shard.first_group, "reasons": {"seen": 1}}


def build(out: Path, num_workers: int, faults: dict[int, str] | None = None) -> list[dict[str, Any]]:
    out.mkdir(exist_ok=True)
    ready = functools.partial(work_on, faults or {})
    return build_shards(out, plan_shards(NUM_SHARDS), ready, runtime=Runtime(num_workers=num_workers), desc="test")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_error_of_a_worker_comes_out_and_shards_that_are_done_stay(num_workers: int, tmp_path: Path):
    with pytest.raises(ValueError, match="row 7 of shard 4 is bad"):
        build(tmp_path / "out", num_workers, {4: "row 7 of shard 4 is bad"})
    kept = files_of(tmp_path / "out")
    assert len(kept) >= 4
    assert not any(name.startswith("shard-00004") for name in kept)
    build(tmp_path / "out", num_workers)
    made = files_of(tmp_path / "out")
    assert len(made) == 2 * NUM_SHARDS
    assert {name: made[name] for name in kept} == kept


def test_killed_worker_ends_the_build_with_what_to_do(tmp_path: Path):
    with pytest.raises(BrokenProcessPool) as raised:
        build(tmp_path / "out", 2, {3: "killed"})
    assert "lower runtime.num_workers" in raised.value.__notes__[0]
    assert len(build(tmp_path / "out", 2)) == NUM_SHARDS


def test_counts_and_files_do_not_depend_on_the_workers(tmp_path: Path):
    found = []
    for num_workers in (1, 2, 5):
        out = tmp_path / str(num_workers)
        counts = build(out, num_workers)
        found.append((counts, {name: (out / name).read_text() for name in files_of(out)}))
    assert len(found[0][1]) == 2 * NUM_SHARDS
    assert [one["first_group"] for one in found[0][0]] == list(range(NUM_SHARDS))
    assert found[0] == found[1] == found[2]


def test_counts_of_kept_shards_are_read_again(tmp_path: Path):
    counts = build(tmp_path / "out", 1)
    assert build(tmp_path / "out", 1, {0: "made again"}) == counts
    assert json.loads((tmp_path / "out" / "shard-00000" / "counts.json").read_text()) == counts[0]


# The plan


@given(st.integers(0, 20_000))
def test_shards_cover_each_group_once_and_are_few_but_not_too_large(num_groups: int):
    shards = plan_shards(num_groups)
    groups = [group for shard in shards for group in range(shard.first_group, shard.end_group)]
    assert groups == list(range(num_groups))
    assert [shard.number for shard in shards] == list(range(len(shards)))
    sizes = {shard.end_group - shard.first_group for shard in shards[:-1]}
    assert len(sizes) <= 1
    assert all(size <= MAX_GROUPS for size in sizes)
    assert len(shards) <= MAX_SHARDS or sizes == {MAX_GROUPS}
