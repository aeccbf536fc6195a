"""A resumable build that dies between its last byte and its place in the store loses nothing that it has made."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sft_core.store.stage import Build
from sft_core.store.store import Store
from tests.store.test_damage import flip_first_byte
from tests.store.test_store import ROOT, stage_of, toy


def build_model(build: Build) -> dict[str, Any]:
    """Trains unless a checkpoint is there; says so, since the test asks what was done again."""
    checkpoints = build.out / "checkpoints"
    with (build.out.parent.parent / "told").open("a") as told:
        told.write("resumed " if checkpoints.is_dir() else "trained ")
    checkpoints.mkdir(exist_ok=True)
    (checkpoints / "checkpoint-1").write_text("weights")
    (build.out / "error-rank0.txt").write_text("of an earlier try")
    (build.out / "model").mkdir(exist_ok=True)
    (build.out / "model" / "weights.bin").write_text("trained")
    return {}


MODEL = stage_of(build_model, resumable=True, temporary=("checkpoints", "error-rank*.txt"))
KILLED = """
import os, signal, sys
root, moment, *sys.path[:0] = sys.argv[1:]
import sft_core.store.store as store
import tests.store.test_finished as t
die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
setattr(store if moment != "put_in_place" else store.Folders, moment, die)
t.Store(root).ensure(t.MODEL, t.toy())
"""
MOMENTS = ("file_digest", "sync", "write_synced", "remove_matching", "put_in_place")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def kill_at(moment: str, store: Store) -> None:
    child = subprocess.run([sys.executable, "-c", KILLED, str(store.root), moment, str(ROOT)])
    assert child.returncode == -signal.SIGKILL
    assert store.refs() == []


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_build_goes_on_from_what_it_has(store: Store, moment: str):
    kill_at(moment, store)
    ref = store.ensure(MODEL, toy())
    assert (store.root / "told").read_text().split() == ["trained", "resumed"][: 2 if moment in MOMENTS[:3] else 1]
    assert list(store.manifest(ref)["files"]) == ["model/weights.bin"]
    assert store.foreign(ref) == [] and store.abandoned() == []
    assert {path.name for path in store.path(ref).iterdir()} == {"manifest.json", "model"}


@pytest.mark.parametrize("name", ["model/weights.bin", "manifest.json"])
def test_damage_in_a_build_that_was_whole_is_found_and_built_again(store: Store, name: str):
    kill_at("remove_matching", store)
    [scratch] = (store.root / ".partial").iterdir()
    flip_first_byte(scratch / name)
    store.verify(store.ensure(MODEL, toy()))
    assert (store.root / "told").read_text().split() == ["trained", "resumed"]
