"""The store: addressed by what goes in, whole or absent, verifiable; with real processes that race and die."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_core.pins.pinned import PinnedRecipe
from sft_core.recipe.parse import override, parse_recipe
from sft_core.store import code_digest as code
from sft_core.store import store as store_module
from sft_core.store.lookups import Lookups
from sft_core.store.provenance import source_code
from sft_core.store.ref import Ref
from sft_core.store.stage import Build, Stage
from sft_core.store.store import Store

ROOT = Path(__file__).resolve().parents[2]
RECIPE: dict[str, Any] = {
    "name": "toy",
    "model": {"model_name_or_path": "org/toy"},
    "dataset_mixture": {"datasets": [{"path": "a.jsonl"}]},
}


def toy(*overrides: str) -> PinnedRecipe:
    return PinnedRecipe(parse_recipe(override(RECIPE, overrides)), {})


def build_numbers(build: Build, *, seed: int) -> dict[str, Any]:
    (build.out / "numbers.txt").write_text(str(seed % 10))
    (build.out / "logs").mkdir()
    (build.out / "logs" / "log.txt").write_text(f"seed {seed}")
    return {"numbers": 1}


def build_sum(build: Build) -> dict[str, Any]:
    (build.out / "sum.txt").write_text((build.inputs["numbers"] / "numbers.txt").read_text() + " summed")
    return {}


NUMBERS = Stage(
    "numbers", build_numbers, lambda pinned, part: {"seed": pinned.recipe.last_phase.training.seed}, version=1
)
SUM = Stage("sum", build_sum, lambda pinned, part: {}, needs=lambda pinned, part: {"numbers": (NUMBERS, {})}, version=1)


@pytest.fixture
def start_child(store: Store) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts a process that builds SLOW; none outlives its test."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        arguments = [sys.executable, "-c", CHILD, str(store.root), str(ROOT)]
        started.append(subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for child in started:
        child.kill()
        child.communicate()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def builds(store: Store) -> list[str]:
    journal = store.root / "builds.jsonl"
    return [json.loads(line)["stage"] for line in journal.read_text().splitlines()] if journal.exists() else []


def stage_of(build, **options) -> Stage:
    return Stage("toy", build, lambda pinned, part: {}, **({"version": 1} | options))


# Keys


def test_key_same_inputs_is_the_same_in_any_store(tmp_path: Path):
    refs = {Store(tmp_path / name).ensure(SUM, toy()) for name in ("a", "b")}
    assert len(refs) == 1


def test_key_moves_with_section_part_version_and_stage_name(store: Store):
    changed = {
        "plain": store.locate(NUMBERS, toy(), {}),
        "section": store.locate(NUMBERS, toy("training.seed=1"), {}),
        "part": store.locate(NUMBERS, toy(), {"source": "a"}),
        "other part": store.locate(NUMBERS, toy(), {"source": "b"}),
        "version": store.locate(Stage("numbers", build_numbers, NUMBERS.section, version=2), toy(), {}),
        "name": store.locate(Stage("digits", build_numbers, NUMBERS.section, version=1), toy(), {}),
    }
    assert len({located.ref.key for located in changed.values()}) == len(changed)


def test_key_other_parts_of_the_recipe_and_places_do_not_move_it(store: Store):
    elsewhere = Stage("numbers", build_numbers, NUMBERS.section, loaders=lambda pinned, part: {"path": "x"}, version=1)
    refs = {store.locate(NUMBERS, toy(), {}).ref, store.locate(elsewhere, toy(), {}).ref}
    refs |= {store.locate(NUMBERS, toy(o), {}).ref for o in ("runtime.num_threads=3", "packing.max_length=9")}
    assert len(refs) == 1


def test_key_code_of_the_builder_moves_it_and_a_comment_does_not(store: Store, tmp_path: Path, monkeypatch):
    (tmp_path / "sft_core").mkdir()
    module = tmp_path / "sft_core" / "toy.py"
    monkeypatch.setattr(code, "ROOT", tmp_path)

    def build(build: Build) -> dict[str, Any]:
        return {}

    build.__module__ = "sft_core.toy"
    keys = []
    for text in ("X = 1\n", "# note\nX = 1\n", "X = 2\n"):
        module.write_text(text)
        keys.append(store.locate(stage_of(build, version=None), toy(), {}).ref.key)
    assert keys[0] == keys[1] != keys[2]


@given(part=st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=3))
def test_key_order_of_a_part_does_not_move_it(part: dict[str, Any]):
    store = Store("nowhere")
    turned = dict(reversed(part.items()))
    assert store.locate(NUMBERS, toy(), part).ref == store.locate(NUMBERS, toy(), turned).ref


def test_places_reach_the_builder_in_place_of_the_section(store: Store):
    def build(build: Build, *, model: str, seed: int) -> dict[str, Any]:
        return {"model": model, "seed": seed}

    section = {"model": "digest", "seed": 1}
    stage = Stage("t", build, lambda pinned, part: section, lambda pinned, part: {"model": "/path"}, version=1)
    manifest = store.manifest(store.ensure(stage, toy()))
    assert manifest["counts"] == {"model": "/path", "seed": 1}
    assert manifest["identity"]["section"] == section


def test_early_cutoff_same_bytes_keep_the_key_downstream(store: Store):
    first = store.ensure(SUM, toy("training.seed=3"))
    again = store.ensure(SUM, toy("training.seed=13"))  # another key of NUMBERS, whose data file says 3 as well
    assert first == again
    assert builds(store) == ["numbers", "sum", "numbers"]
    assert store.ensure(SUM, toy("training.seed=4")) != first


def build_told(build: Build) -> dict[str, Any]:
    assert build.inputs == {}
    (build.out / "told.txt").write_text(f"{build.manifests['numbers']['ref']} {build.manifests['numbers']['counts']}")
    return {}


TOLD = Stage(
    "told",
    build_told,
    lambda pinned, part: {},
    reads_manifest_of=lambda pinned, part: {"numbers": (NUMBERS, {})},
    version=1,
)


def test_output_is_whole_though_the_journal_has_no_room(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(Store, "_journal", full)
    ref = store.ensure(NUMBERS, toy())
    store.verify(ref)
    assert f"{ref} has no line in builds.jsonl" in caplog.text


def test_probe_of_a_writable_store_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch):
    """The probe has no name that a kill could leave."""
    plain = store_module.tempfile.TemporaryFile

    def opened(**options: Any) -> Any:
        file = plain(**options)
        assert list((store.root / ".locks").iterdir()) == []
        return file

    monkeypatch.setattr(store_module.tempfile, "TemporaryFile", opened)
    store.check_writable()
    assert list((store.root / ".locks").iterdir()) == []


def test_counts_that_are_no_json_are_not_stored(store: Store):
    def build_nan(build: Build) -> dict[str, Any]:
        return {"loss": float("nan")}

    stage = Stage("nan", build_nan, lambda pinned, part: {}, version=1)
    with pytest.raises(ValueError, match="JSON compliant"):
        store.ensure(stage, toy())
    assert not store.has(store.locate(stage, toy(), {}).ref)


def test_mentioned_output_is_built_first_told_by_its_manifest_and_part_of_the_key(store: Store):
    assert store.locate(TOLD, toy(), {}).status == "depends"
    ref = store.ensure(TOLD, toy())
    numbers = store.locate(NUMBERS, toy(), {}).ref
    assert builds(store) == ["numbers", "told"]
    assert (store.path(ref) / "told.txt").read_text() == f"{list(numbers)} {{'numbers': 1}}"
    assert store.manifest(ref)["inputs"] == {"numbers": list(numbers)}
    changed = toy("training.seed=7")
    store.ensure(NUMBERS, changed)
    assert store.locate(TOLD, changed, {}).ref.key != ref.key


def test_logs_are_verified_but_no_part_of_the_content(store: Store):
    three, thirteen = (store.manifest(store.ensure(NUMBERS, toy(f"training.seed={s}"))) for s in (3, 13))
    assert three["files"]["logs/log.txt"] != thirteen["files"]["logs/log.txt"]
    assert three["content"] == thirteen["content"]


# Lookups


def test_lookups_locate_each_output_once_however_many_read_it(store: Store):
    asked = []

    def section(pinned: PinnedRecipe, part: dict[str, Any]) -> dict[str, Any]:
        asked.append(part)
        return {}

    shared = Stage("shared", build_numbers, section, version=1)
    readers = [
        Stage(name, build_sum, lambda pinned, part: {}, needs=lambda pinned, part: {"numbers": (shared, {})}, version=1)
        for name in ("a", "b")
    ]
    lookups = Lookups()
    found = [store.locate(stage, toy(), {}, lookups) for stage in (*readers, shared, *readers)]
    assert asked == [{}] and found[0] is found[3]
    store.locate(readers[0], toy(), {})
    assert len(asked) == 2, "without them nothing is kept"


def test_lookups_digest_the_code_of_a_stage_once_and_new_ones_digest_it_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "sft_core").mkdir()
    module = tmp_path / "sft_core" / "toy.py"
    monkeypatch.setattr(code, "ROOT", tmp_path)

    def build(build: Build) -> dict[str, Any]:
        return {}

    build.__module__ = "sft_core.toy"
    stage, lookups = stage_of(build, version=None), Lookups()
    module.write_text("X = 1\n")
    first = store.locate(stage, toy(), {"source": "a"}, lookups).identity["code"]
    module.write_text("X = 22\n")
    second = store.locate(stage, toy(), {"source": "b"}, lookups).identity["code"]
    anew = store.locate(stage, toy(), {"source": "b"}, Lookups()).identity["code"]
    assert first == second != anew


def test_lookups_know_what_ensure_has_built(store: Store):
    lookups = Lookups()
    assert store.locate(SUM, toy(), {}, lookups).status == "depends"
    ref = store.ensure(SUM, toy(), lookups)
    assert store.locate(SUM, toy(), {}, lookups).ref == ref
    assert [store.locate(stage, toy(), {}, lookups).status for stage in (NUMBERS, SUM)] == ["hit", "hit"]


# Building


def test_ensure_second_time_builds_nothing(store: Store):
    ref = store.ensure(SUM, toy())
    assert builds(store) == ["numbers", "sum"]
    assert store.ensure(SUM, toy()) == ref
    assert builds(store) == ["numbers", "sum"]
    assert (store.path(ref) / "sum.txt").read_text() == "2 summed"


def test_locate_status_goes_from_depends_to_build_to_hit(store: Store):
    assert [store.locate(stage, toy(), {}).status for stage in (NUMBERS, SUM)] == ["build", "depends"]
    assert store.locate(SUM, toy(), {}).ref is None
    store.ensure(NUMBERS, toy())
    assert [store.locate(stage, toy(), {}).status for stage in (NUMBERS, SUM)] == ["hit", "build"]
    store.ensure(SUM, toy())
    assert [store.locate(stage, toy(), {}).status for stage in (NUMBERS, SUM)] == ["hit", "hit"]


def test_manifest_tells_what_was_built_from_what(store: Store):
    ref = store.ensure(SUM, toy())
    manifest = store.manifest(ref)
    assert manifest["ref"] == list(ref)
    assert manifest["identity_sha256"].startswith(ref.key)
    assert manifest["inputs"] == {"numbers": list(store.locate(NUMBERS, toy(), {}).ref)}
    assert manifest["files"]["sum.txt"]["bytes"] == len("2 summed")
    assert set(manifest["files"]) == {"sum.txt"}
    assert manifest["source_code"] == source_code()
    assert "source_code" not in manifest["identity"]


def test_failing_build_leaves_nothing_to_read_and_names_the_stage(store: Store):
    def build(build: Build) -> dict[str, Any]:
        (build.out / "half.txt").write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no") as caught:
        store.ensure(stage_of(build), toy(), source="a")
    located = store.locate(stage_of(build), toy(), {"source": "a"})
    assert caught.value.__notes__ == [f"while building toy a ({located.ref})"]
    assert located.status == "build"
    assert store.refs() == [] and builds(store) == []
    assert not store.scratch(located.ref).exists()
    assert store.abandoned() == []


def test_manifest_that_cannot_be_written_leaves_nothing_to_read(store: Store):
    def build(build: Build) -> dict[str, Any]:
        (build.out / "data.txt").write_text("whole")
        return {"counts": {1, 2}}  # a set is no JSON

    with pytest.raises(TypeError, match="JSON"):
        store.ensure(stage_of(build, resumable=True), toy())
    assert store.refs() == []


def test_build_output_is_not_visible_until_it_is_whole(store: Store):
    seen = []

    def build(build: Build) -> dict[str, Any]:
        (build.out / "data.txt").write_text("whole")
        seen.append((store.refs(), list(store.root.glob("toy/*")), sorted(path.name for path in build.out.iterdir())))
        return {}

    ref = store.ensure(stage_of(build), toy())
    assert seen == [([], [], ["data.txt"])]
    assert sorted(path.name for path in store.path(ref).iterdir()) == ["data.txt", "manifest.json"]


@pytest.mark.parametrize("resumable", [False, True])
def test_failed_build_scratch_is_kept_only_for_a_resumable_stage(store: Store, resumable: bool):
    def build(build: Build) -> dict[str, Any]:
        found = [path.name for path in build.out.iterdir()]
        (build.out / "shard-0").write_text("0")
        if not (store.root / "mended").exists():
            raise RuntimeError("no")
        return {"found": found}

    stage = stage_of(build, resumable=resumable)
    with pytest.raises(RuntimeError):
        store.ensure(stage, toy())
    scratch = store.scratch(store.locate(stage, toy(), {}).ref)
    assert scratch.exists() == resumable
    assert store.abandoned() == ([scratch] if resumable else [])
    (store.root / "mended").touch()
    manifest = store.manifest(store.ensure(stage, toy()))
    assert manifest["counts"] == {"found": ["shard-0"] if resumable else []}
    assert store.abandoned() == []


def test_ensure_where_a_killed_removal_left_files_builds(store: Store):
    ref = store.ensure(NUMBERS, toy())
    folder = store.path(ref)
    (folder / "manifest.json").unlink()
    (folder / "stray.txt").write_text("x")
    assert store.refs() == []
    assert store.ensure(NUMBERS, toy()) == ref
    assert not (folder / "stray.txt").exists()
    store.verify(ref)


# Processes: the child imports this module and builds SLOW


def build_slowly(build: Build) -> dict[str, Any]:
    (build.out / "data.txt").write_text("half")
    (build.out.parents[1] / f"started-{os.getpid()}").touch()
    while (build.out.parents[1] / "hold").exists():
        time.sleep(0.01)
    (build.out / "data.txt").write_text("whole")
    return {}


SLOW = stage_of(build_slowly)
CHILD = """
import logging, os, sys
root, *sys.path[:0] = sys.argv[1:]
import tests.store.test_store as t
logging.basicConfig(filename=f"{root}/log-{os.getpid()}", level=logging.INFO)
print(t.Store(root).ensure(t.SLOW, t.toy()))
"""


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_build_killed_in_the_middle_is_not_visible_and_the_next_builds(store: Store, start_child):
    store.root.mkdir()
    (store.root / "hold").touch()
    child = start_child()
    wait_for(lambda: list(store.root.glob("started-*")))
    ref = store.locate(SLOW, toy(), {}).ref
    assert (store.scratch(ref) / "data.txt").read_text() == "half"
    assert store.abandoned() == []  # it is being worked on
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL

    assert store.refs() == [] and not store.has(ref)
    assert store.abandoned() == [store.scratch(ref)]
    (store.root / "hold").unlink()
    assert store.ensure(SLOW, toy()) == ref
    assert (store.path(ref) / "data.txt").read_text() == "whole"
    assert builds(store) == ["toy"] and store.abandoned() == []


@pytest.mark.slow
def test_two_processes_one_output_is_built_once_and_both_read_it(store: Store, start_child):
    store.root.mkdir()
    (store.root / "hold").touch()
    children = [start_child(), start_child()]
    wait_for(lambda: any("status=waiting" in path.read_text() for path in store.root.glob("log-*")))
    wait_for(lambda: list(store.root.glob("started-*")))
    assert len(list(store.root.glob("started-*"))) == 1
    (store.root / "hold").unlink()
    outputs = [child.communicate(timeout=30) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] == f"{store.locate(SLOW, toy(), {}).ref}\n"
    assert builds(store) == ["toy"]
    assert len(list(store.root.glob("started-*"))) == 1


# Stores that cannot be written


def test_ensure_store_below_a_file_says_what_to_do(tmp_path: Path):
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "store")
    with pytest.raises(OSError, match=r"file/store cannot be written \(Not a directory\).*runtime\.store"):
        store.ensure(NUMBERS, toy())


def test_ensure_store_where_nobody_may_write_says_what_to_do():
    with pytest.raises(OSError, match=r"the store at /proc/sft-store cannot be written \("):
        Store("/proc/sft-store").ensure(NUMBERS, toy())


def test_ensure_hit_in_a_store_that_takes_no_times_is_still_read(store: Store, monkeypatch: pytest.MonkeyPatch):
    ref = store.ensure(NUMBERS, toy())
    asked = []

    def refuse(path: Path) -> None:  # what a read-only mount answers; a test has no right to mount one
        asked.append(path)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "utime", refuse)
    assert store.ensure(NUMBERS, toy()) == ref
    assert asked == [store.path(ref)]


def test_ensure_full_disk_says_so_and_leaves_nothing(store: Store):
    def build(build: Build) -> dict[str, Any]:
        Path("/dev/full").write_text("x")
        return {}

    with pytest.raises(OSError, match=r"no space is left for the store at .*`sft store gc`") as caught:
        store.ensure(stage_of(build), toy())
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.__notes__[0].startswith("while building toy - (toy/")
    assert isinstance(caught.value.__context__, OSError)
    assert store.refs() == [] and store.abandoned() == []


def test_root_in_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Store("~/store").root == tmp_path / "store"


# Looking after


def test_find_by_key_by_prefix_and_by_stage(store: Store):
    numbers, total = store.ensure(NUMBERS, toy()), store.ensure(SUM, toy())
    assert store.find(str(numbers)) == numbers
    assert store.find(f"sum/{total.key[:4]}") == total == store.find("sum/")
    assert store.find(total.key) == total
    with pytest.raises(ValueError, match=r"no output of the store at .* match 'sum/zz'; `sft store list`"):
        store.find("sum/zz")
    with pytest.raises(ValueError, match="2 outputs of the store"):
        store.find("")


def test_refs_least_used_come_first_and_a_hit_counts_as_use(store: Store):
    numbers, total = store.ensure(NUMBERS, toy()), store.ensure(SUM, toy())
    for age, ref in ((100, numbers), (50, total)):
        os.utime(store.path(ref), (time.time() - age,) * 2)
    assert store.refs() == [numbers, total]
    store.ensure(NUMBERS, toy())
    assert store.refs() == [total, numbers]
    assert time.time() - store.last_used(numbers) < 10


def test_remove_takes_one_output_and_the_next_ensure_builds_it(store: Store):
    numbers, total = store.ensure(NUMBERS, toy()), store.ensure(SUM, toy())
    store.remove(numbers)
    assert store.refs() == [total]
    with pytest.raises(FileNotFoundError, match=f"{numbers} is not in the store at {store.root}"):
        store.path(numbers)
    assert store.ensure(SUM, toy()) == total
    assert builds(store) == ["numbers", "sum", "numbers"]


def test_moved_store_refs_still_hold(store: Store, tmp_path: Path):
    ref = store.ensure(SUM, toy())
    store.root.rename(tmp_path / "moved")
    moved = Store(tmp_path / "moved")
    moved.verify(Ref(*str(ref).split("/")))
    assert moved.ensure(SUM, toy()) == ref
    assert builds(moved) == ["numbers", "sum"]
