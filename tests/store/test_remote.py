"""A store behind a URL: whole there or absent, read through a local folder, on several machines at once.

A machine is a cache folder. The server is S3 as moto has it, on loopback; processes race and are killed.
"""

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from click.testing import CliRunner

from sft_core.recipe.parse import parse_recipe
from sft_core.store.digests import write_digests
from sft_core.store.lookups import Lookups
from sft_core.store.manifest import CorruptOutput
from sft_core.store.ref import Ref
from sft_core.store.remote import Remote
from sft_core.store.stage import Build, Stage
from sft_core.store.store import Store
from steps.cli.main import main
from steps.start import prepare
from tests.object_server import ObjectServer
from tests.store.test_damage import flip_first_byte
from tests.store.test_store import NUMBERS, RECIPE, SUM, TOLD, builds, stage_of, toy, wait_for

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def started() -> Iterator[ObjectServer]:
    with ObjectServer() as server:
        yield server


@pytest.fixture
def server(started: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> ObjectServer:
    for name, value in started.environment.items():
        monkeypatch.setenv(name, value)
    started.hold = started.refuse = ""
    started.num_held = 0
    return started


@pytest.fixture
def url(server: ObjectServer, request: pytest.FixtureRequest) -> str:
    name = hashlib.sha256(request.node.name.encode()).hexdigest()[:20]
    return server.bucket(name) + "/some/prefix"


@pytest.fixture
def machine(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Store]:
    """The store as the machine of that name sees it."""

    def on(name: str) -> Store:
        monkeypatch.setenv("SFT_CACHE", str(tmp_path / name))
        return Store(url)

    return on


@pytest.fixture
def start_child(url: str, tmp_path: Path) -> Iterator[Callable[[str, str], subprocess.Popen[str]]]:
    """Runs code with `store` and this module as `t` on the machine of that name; no child outlives its test."""
    started: list[subprocess.Popen[str]] = []

    def start(name: str, code: str) -> subprocess.Popen[str]:
        lines = f"import sys; sys.path[:0] = [{str(ROOT)!r}]\nimport tests.store.test_remote as t\n"
        command = [sys.executable, "-c", f"{lines}store = t.Store({url!r})\n{code}"]
        env = os.environ | {"SFT_CACHE": str(tmp_path / name), "HOLD": str(tmp_path / "hold")}
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env))
        return started[-1]

    yield start
    for child in started:
        child.kill()
        child.communicate()


def data_requests(server: ObjectServer) -> list[str]:
    return [one.path for one in server.requests if "/.data/" in one.path]


def build_pair(build: Build) -> dict[str, Any]:
    (build.out / "part").mkdir()
    (build.out / "part" / "a.txt").write_text("a")
    (build.out / "b.txt").write_text("b")
    return {}


PAIR = stage_of(build_pair)


# There and back, over any protocol


@pytest.mark.parametrize("protocol", ["memory", "file", "s3"])
def test_output_built_on_one_machine_is_read_on_another(
    protocol: str, server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request
):
    places = {"memory": "memory://b/p", "file": f"file://{tmp_path}/there"}
    url = places.get(protocol) or request.getfixturevalue("url")
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "one"))
    one = Store(url)
    assert one.refs() == [] and one.locate(SUM, toy(), {}).status == "depends"
    ref = one.ensure(SUM, toy())
    assert builds(one) == ["numbers", "sum"]
    assert one.root.parent == tmp_path / "one"

    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "two"))
    two = Store(url)
    assert {str(ref).split("/")[0] for ref in two.refs()} == {"numbers", "sum"}
    assert two.ensure(SUM, toy()) == ref
    assert builds(two) == [] and not two.is_here(ref)
    assert two.manifest(ref) == one.manifest(ref) and not two.is_here(ref)
    with two.open(ref, "sum.txt") as file:
        assert file.read() == b"2 summed" and not two.is_here(ref)
    assert (two.path(ref) / "sum.txt").read_text() == "2 summed"
    assert two.is_here(ref) and two.num_bytes(ref) == len("2 summed") and time.time() - two.last_used(ref) < 60
    for store in (one, two):
        store.verify(ref)
        store.verify(ref, remote=True)
    two.remove(ref)
    assert [ref.stage for ref in Store(url).refs()] == ["numbers"] and not two.is_here(ref)
    assert two.ensure(SUM, toy()) == ref and builds(two) == ["sum"]


def test_cache_is_below_home_unless_the_variable_says_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SFT_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    first, second = Store("memory://b/one"), Store("memory://b/two/")
    assert first.root.parent == second.root.parent == tmp_path / ".cache" / "sft-flow"
    assert first.root != second.root == Store("memory://b/two").root
    assert not first.root.exists()


# Uploads


def test_upload_manifest_comes_last_and_a_hit_moves_no_data(machine: Callable, server: ObjectServer):
    store = machine("one")
    server.requests.clear()
    ref = store.ensure(PAIR, toy())
    written = [one.path for one in server.requests if one.method == "PUT" and "probe" not in one.path]
    assert len(written) == 3 and written[-1].endswith(f"outputs/{ref}/manifest.json")
    assert all("/.data/" in path for path in written[:2])

    for name in ("one", "two"):
        store = machine(name)
        server.requests.clear()
        assert store.ensure(PAIR, toy()) == ref
        assert [one.method for one in server.requests] == ["GET"]  # the list
    assert (store.path(ref) / "part" / "a.txt").read_text() == "a"
    assert len(data_requests(server)) == 2
    server.requests.clear()
    assert (machine("two").path(ref) / "b.txt").read_text() == "b"
    assert server.requests == []


def test_mentioned_output_is_not_downloaded(machine: Callable):
    numbers = machine("one").ensure(NUMBERS, toy())
    two = machine("two")
    two.verify(two.ensure(TOLD, toy()))
    assert not two.is_here(numbers) and builds(two) == ["told"]


@pytest.mark.slow
def test_upload_killed_leaves_nothing_to_see_and_the_next_ensure_ends_it(
    machine: Callable, server: ObjectServer, start_child: Callable
):
    server.hold = r"PUT .*manifest\.json"
    child = start_child("one", "store.ensure(t.PAIR, t.toy())")
    wait_for(lambda: server.num_held)
    child.send_signal(signal.SIGKILL)
    child.wait()
    server.requests.clear()
    other = machine("two")
    assert any("/.data/" in f"/{name}" for name in server.names(other.address.split("/")[2]))
    assert other.refs() == [] and other.locate(PAIR, toy(), {}).status == "build"
    # Not before here: the dead client's request is dropped, as a server drops a body that does not arrive.
    server.refuse, server.hold = server.hold, ""
    time.sleep(0.1)
    server.refuse = ""

    store = machine("one")
    ref = store.locate(PAIR, toy(), {}).ref
    assert not store.has(ref) and builds(store) == ["toy"]
    assert store.ensure(PAIR, toy()) == ref
    assert builds(store) == ["toy"], "what was whole is uploaded, not built again"
    store.verify(ref, remote=True)
    assert machine("two").has(ref)


def test_upload_that_fails_says_where_the_output_is(machine: Callable, server: ObjectServer):
    server.refuse = "PUT .*/b.txt"
    store = machine("one")
    told = r"the store at s3://.* cannot be reached \(PermissionError: Access Denied"
    with pytest.raises(OSError, match=told) as caught:
        store.ensure(PAIR, toy())
    assert any("it is whole in" in note and str(store.root) in note for note in caught.value.__notes__)
    assert machine("two").refs() == []


# Downloads


@pytest.mark.slow
def test_download_killed_leaves_nothing_to_see(machine: Callable, server: ObjectServer, start_child: Callable):
    ref = machine("one").ensure(PAIR, toy())
    server.hold = "GET .*/b.txt"
    child = start_child("two", f"store.path(t.Ref(*{tuple(ref)}))")
    wait_for(lambda: server.num_held)
    store = machine("two")
    wait_for(lambda: list(store.root.glob(".fetching/*/part/a.txt")))
    assert store.abandoned() == []  # it is being worked on
    child.send_signal(signal.SIGKILL)
    child.wait()
    server.hold = ""
    assert not store.is_here(ref) and not list(store.root.glob("[!.]*/*"))
    assert len(store.abandoned()) == 1
    assert (store.path(ref) / "b.txt").read_text() == "b"
    assert store.abandoned() == []


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_damaged_file_is_told_by_name_and_never_read(machine: Callable, server: ObjectServer, damage: str):
    ref = machine("one").ensure(PAIR, toy())
    store = machine("two")
    bucket = store.address.split("/")[2]
    (name,) = [name for name in server.names(bucket) if name.endswith("part/a.txt")]
    if damage == "flipped":
        server.client.put_object(Bucket=bucket, Key=name, Body=b"x")
    else:
        server.client.delete_object(Bucket=bucket, Key=name)
    told = r"part/a\.txt has 1 bytes with another digest" if damage == "flipped" else r"part/a\.txt is missing"
    with pytest.raises(CorruptOutput, match=rf"{ref}: .*{told}.*`sft store gc {ref} --delete --store s3://"):
        store.path(ref)
    assert not store.is_here(ref) and store.abandoned() == []
    with pytest.raises(CorruptOutput, match=r"part/a\.txt (has|is missing)"):
        machine("one").verify(ref, remote=True)  # what lies there, though the copy here is whole
    machine("one").verify(ref)
    machine("one").remove(ref)
    assert machine("two").ensure(PAIR, toy()) == ref
    machine("two").verify(ref, remote=True)


def test_damaged_copy_is_told_before_it_is_trained_on(machine: Callable):
    ref = machine("one").ensure(NUMBERS, toy())
    store = machine("two")
    flip_first_byte(store.path(ref) / "numbers.txt")
    stage = stage_of(build_pair, needs=SUM.needs)
    with pytest.raises(CorruptOutput, match=rf"numbers.txt has 1 bytes.* Remove {store.root}/{ref}, the copy here"):
        store.ensure(stage, toy())
    shutil.rmtree(store.root / ref.stage / ref.key)
    store.ensure(stage, toy())


def test_manifest_that_cannot_be_read_is_corrupt_and_can_be_removed(machine: Callable, server: ObjectServer):
    ref = machine("one").ensure(PAIR, toy())
    store = machine("two")
    bucket, prefix = store.address.split("/")[2], "some/prefix/outputs"
    server.client.put_object(Bucket=bucket, Key=f"{prefix}/{ref}/manifest.json", Body=b"{")
    server.client.put_object(Bucket=bucket, Key=f"{prefix}/folder/")  # as consoles make them
    with pytest.raises(CorruptOutput, match=rf"{ref}: manifest\.json cannot be read"):
        store.manifest(ref)
    assert store.refs() == [ref]
    store.remove(ref)
    machine("three").ensure(PAIR, toy())
    assert store.manifest(ref)["ref"] == list(ref)


# Several machines


def build_own(build: Build) -> dict[str, Any]:
    """Other bytes in each process."""
    (build.out / "data.txt").write_text(f"{os.getpid()}")
    Path(f"{os.environ['HOLD']}-{os.getpid()}").touch()
    while not Path(os.environ["HOLD"]).exists():
        time.sleep(0.01)
    return {}


OWN = stage_of(build_own)


@pytest.mark.slow
def test_race_of_two_machines_one_wins_and_both_read_it(
    machine: Callable, server: ObjectServer, start_child: Callable, tmp_path: Path
):
    code = "ref = store.ensure(t.OWN, t.toy()); print((store.path(ref) / 'data.txt').read_text())"
    children = [start_child(name, code) for name in ("one", "two")]
    wait_for(lambda: len(list(tmp_path.glob("hold-*"))) == 2)
    server.hold = r"PUT .*manifest\.json"  # both have uploaded their data when the first manifest is written
    (tmp_path / "hold").touch()
    wait_for(lambda: server.num_held == 2)
    server.hold = ""
    outputs = [child.communicate(timeout=30) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] != ""
    store = machine("three")
    (ref,) = store.refs()
    store.verify(ref, remote=True)
    assert (store.path(ref) / "data.txt").read_text() == outputs[0][0].strip()
    data = [name for name in server.names(store.address.split("/")[2]) if "/.data/" in name]
    assert len(data) == 1, "what lost is removed"


STEPS = 5


def build_steps(build: Build) -> dict[str, Any]:
    """A checkpoint a step, the newest two kept; SFT_FAIL_AT is where the machine fails."""
    folder = build.out / "checkpoints"
    there = sorted(path.name for path in folder.glob("checkpoint-*"))
    first = int(there[-1].rpartition("-")[2]) + 1 if there else 0
    for step in range(first, STEPS):
        if os.environ.get("SFT_FAIL_AT") == str(step):
            raise RuntimeError("the machine is lost")
        checkpoint = folder / f"checkpoint-{step}"
        (checkpoint / "state").mkdir(parents=True)
        (checkpoint / "state" / "weights.bin").write_bytes(b"%d" % step)
        write_digests(checkpoint)
        for old in sorted(folder.iterdir())[:-2]:
            shutil.rmtree(old)
        build.keep(checkpoint)
    (build.out / "model.txt").write_text("trained")
    shutil.rmtree(folder)
    return {"found": there}


STEPPED = stage_of(build_steps, resumable=True)


def fail_at(step: int, store: Store, monkeypatch: pytest.MonkeyPatch) -> Ref:
    monkeypatch.setenv("SFT_FAIL_AT", str(step))
    with pytest.raises(RuntimeError, match="machine is lost"):
        store.ensure(STEPPED, toy())
    monkeypatch.delenv("SFT_FAIL_AT")
    return store.locate(STEPPED, toy(), {}).ref


def kept(server: ObjectServer, store: Store) -> list[str]:
    return [name.split("/.partial/")[1] for name in server.names(store.address.split("/")[2]) if "/.partial/" in name]


def test_kept_checkpoints_outlive_the_machine(machine: Callable, server: ObjectServer, monkeypatch: pytest.MonkeyPatch):
    store = machine("one")
    server.requests.clear()
    ref = fail_at(3, store, monkeypatch)
    name = f"toy-{ref.key}/checkpoints"
    found = [f"{name}/checkpoint-{step}/{file}" for step in (1, 2) for file in ("digests.json", "state/weights.bin")]
    assert kept(server, store) == found, "as many as there are here"
    written = [one.path for one in server.requests if one.method == "PUT" and "/.partial/" in one.path]
    assert [path.endswith("digests.json") for path in written] == [False, True] * 3
    calls = [(one.method, one.path) for one in server.requests if "/.partial/" in one.path]
    newest = max(n for n, (method, path) in enumerate(calls) if method == "PUT" and "checkpoint-2" in path)
    oldest = min(n for n, (method, path) in enumerate(calls) if method == "DELETE" and "checkpoint-0" in path)
    assert newest < oldest, "until the newer one is whole the older one stays"
    assert store.refs() == []

    other = machine("two")
    assert other.ensure(STEPPED, toy()) == ref
    assert other.manifest(ref)["counts"]["found"] == ["checkpoint-1", "checkpoint-2"]
    assert kept(server, store) == [] and other.abandoned() == []
    assert list(other.manifest(ref)["files"]) == ["model.txt"]


def test_kept_checkpoint_that_is_torn_is_passed_over(
    machine: Callable, server: ObjectServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    ref = fail_at(3, machine("one"), monkeypatch)
    bucket, name = machine("two").address.split("/")[2], f"some/prefix/.partial/toy-{ref.key}/checkpoints"
    server.client.put_object(Bucket=bucket, Key=f"{name}/checkpoint-2/state/weights.bin", Body=b"torn")
    server.client.put_object(Bucket=bucket, Key=f"{name}/checkpoint-3/state/weights.bin", Body=b"3")  # no digests yet
    store = machine("two")
    with caplog.at_level(logging.INFO):
        store.ensure(STEPPED, toy())
    assert store.manifest(ref)["counts"]["found"] == ["checkpoint-1"]
    assert "kept=checkpoints/checkpoint-2 is damaged and left out" in caplog.text
    assert kept(server, store) == []


def test_kept_checkpoint_with_digests_of_before_is_compared_with_them(
    machine: Callable, server: ObjectServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    ref = fail_at(3, machine("one"), monkeypatch)
    bucket, name = machine("two").address.split("/")[2], f"some/prefix/.partial/toy-{ref.key}/checkpoints"
    for step, content in ((1, b"1"), (2, b"another")):
        digests = json.dumps({"state/weights.bin": hashlib.sha256(content).hexdigest()})
        server.client.put_object(Bucket=bucket, Key=f"{name}/checkpoint-{step}/digests.json", Body=digests.encode())
    store = machine("two")
    store.ensure(STEPPED, toy())
    assert store.manifest(ref)["counts"]["found"] == ["checkpoint-1"]
    assert "kept=checkpoints/checkpoint-2 is damaged and left out" in caplog.text


def test_checkpoint_that_goes_while_it_is_uploaded_is_not_kept(machine: Callable, server: ObjectServer, tmp_path: Path):
    store, folder = machine("one"), tmp_path / "out" / "checkpoint-1"
    folder.mkdir(parents=True)
    for name in ("weights.bin", "digests.json"):
        (folder / name).write_text("{}")
    server.hold = "PUT .*weights"
    keeping = threading.Thread(target=store.remote.keep, args=("toy-0", tmp_path / "out", folder))
    keeping.start()
    wait_for(lambda: server.num_held)
    shutil.rmtree(folder)
    server.hold = ""
    keeping.join()
    assert any("weights" in one.path for one in server.requests if one.method == "DELETE")
    assert kept(server, store) == []


def test_kept_checkpoints_here_come_before_those_there(machine: Callable, server: ObjectServer, monkeypatch):
    fail_at(2, machine("one"), monkeypatch)
    server.requests.clear()
    store = machine("one")
    ref = store.ensure(STEPPED, toy())
    assert store.manifest(ref)["counts"]["found"] == ["checkpoint-0", "checkpoint-1"]
    assert not [one for one in server.requests if one.method == "GET" and "/.partial/" in one.path]


def test_kept_checkpoint_replaces_the_same_one_that_is_torn_here(machine: Callable, monkeypatch, caplog):
    ref, store = fail_at(3, machine("one"), monkeypatch), machine("one")
    (store.scratch(ref) / "checkpoints" / "checkpoint-2" / "state" / "weights.bin").write_bytes(b"torn")
    with caplog.at_level(logging.INFO):
        store.ensure(STEPPED, toy())
    assert "kept=checkpoints/checkpoint-2 status=fetched" in caplog.text


def test_machine_that_comes_back_goes_on_from_the_newer_checkpoint(
    machine: Callable, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
):
    ref = fail_at(2, machine("one"), monkeypatch)
    fail_at(4, machine("two"), monkeypatch)
    store = machine("one")
    fail_at(4, store, monkeypatch)
    newest = ["checkpoint-2", "checkpoint-3"]
    assert sorted(path.name for path in (store.scratch(ref) / "checkpoints").iterdir())[-2:] == newest
    assert {name.split("/")[2] for name in kept(server, store)} == {*newest}
    store.ensure(STEPPED, toy())
    assert store.manifest(ref)["counts"]["found"][-2:] == newest


def test_keep_in_a_folder_store_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = Store(tmp_path / "store")
    ref = fail_at(3, store, monkeypatch)
    assert [path.name for path in (tmp_path / "store" / ".partial").iterdir()] == [f"toy-{ref.key}"]
    store.ensure(STEPPED, toy())
    assert store.manifest(ref)["counts"]["found"] == ["checkpoint-1", "checkpoint-2"]


# What it costs


@pytest.mark.slow
def test_locating_sixty_outputs_lists_once(machine: Callable, server: ObjectServer, url: str, tmp_path: Path):
    parts = [{"number": str(number)} for number in range(30)]
    total = Stage("sum", SUM.build, SUM.section, needs=lambda pinned, part: {"numbers": (NUMBERS, part)}, version=1)
    machine("one")
    elsewhere = Store(f"file://{tmp_path}/there")
    for part in parts:
        elsewhere.ensure(total, toy(), **part)
    for path in (tmp_path / "there").glob("outputs/*/*/manifest.json"):  # a plan asks for nothing else
        name = f"some/prefix/{path.relative_to(tmp_path / 'there')}"
        server.client.put_object(Bucket=url.split("/")[2], Key=name, Body=path.read_bytes())
    counts = []
    for _ in range(2):
        server.requests.clear()
        store, lookups = machine("two"), Lookups()
        found = [store.locate(stage, toy(), part, lookups) for stage in (NUMBERS, total) for part in parts]
        assert {located.status for located in found} == {"hit"} and len({located.ref for located in found}) == 60
        counts.append(len(server.requests))
    assert counts == [1 + 30, 1]  # a list, and the manifest of each input once


def test_refreshed_store_has_what_another_machine_made_since(machine: Callable):
    """As the nodes of a gang wait for the first one's output, which they listed before it was there."""
    mine, other = machine("mine"), machine("other")
    assert mine.locate(PAIR, toy(), {}).status == "build"
    other.ensure(PAIR, toy())
    assert mine.locate(PAIR, toy(), {}).status == "build", "it lists once"
    mine.refresh()
    assert mine.locate(PAIR, toy(), {}).status == "hit"


@pytest.mark.slow
def test_commands_work_with_a_url_and_a_second_machine_downloads_what_it_reads(
    machine: Callable, server: ObjectServer, url: str, small_recipe: dict[str, Any], save_recipe: Callable
):
    small_recipe["runtime"]["store"] = url
    recipe = save_recipe(small_recipe)

    def sft(*arguments: str) -> str:
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    machine("one")
    assert "0 are there" in sft("plan", recipe)
    sft("show", recipe, "--source", "copy_no_think")
    machine("two")
    server.requests.clear()
    assert "3 are there" in sft("plan", recipe)
    assert not [path for path in data_requests(server) if not path.endswith("conversations.parquet")]
    assert len(server.requests) < 10
    assert "copy_no_think" in sft("check", recipe)
    assert "6 outputs verified, 0 damaged" in sft("verify", "--store", url)
    assert "6 outputs, " in sft("store", "list", "--store", url)
    assert "not-to-be-told" not in "".join(path.read_text() for path in Store(url).root.glob("*/*/manifest.json"))


def test_gc_takes_the_manifest_first_and_what_unfinished_builds_left(
    machine: Callable, server: ObjectServer, url: str, monkeypatch: pytest.MonkeyPatch
):
    store = machine("one")
    fail_at(3, store, monkeypatch)
    ref = store.ensure(PAIR, toy(), source="a")
    other = store.ensure(PAIR, toy(), source="b")

    def gc(*arguments: str) -> str:
        return CliRunner().invoke(main, ["store", "gc", "--store", url, *arguments], catch_exceptions=False).output

    assert f"would remove {ref}  2 Bytes\n1 outputs" in gc(str(ref))
    assert gc("--unused-for", "1").startswith("0 outputs")
    server.requests.clear()
    assert f"removed {ref}" in gc(str(ref), "--delete")
    deleted = [one.path for one in server.requests if one.method == "DELETE"]
    assert len(deleted) == 3 and deleted[0].endswith(f"{ref}/manifest.json")
    assert machine("one").refs() == [other] and not store.is_here(ref)
    assert gc("--unused-for", "0").count("(unfinished)") == 2, "the scratch here, and what is kept there"
    gc("--unused-for", "0", "--delete")
    assert server.names(url.split("/")[2]) == [] and store.abandoned() == []


def test_use_is_noted_once_a_day(machine: Callable, server: ObjectServer, monkeypatch: pytest.MonkeyPatch):
    ref = machine("one").ensure(PAIR, toy())
    monkeypatch.setattr("sft_core.store.store.USE_NOTED_S", -60)  # a day later
    server.requests.clear()
    machine("two").ensure(PAIR, toy())
    assert [one.path.rpartition("/")[2] for one in server.requests if one.method == "PUT"] == ["used"]
    server.refuse = "PUT .*/used"
    assert machine("two").ensure(PAIR, toy()) == ref, "a store that others keep may be read-only"
    server.refuse = ""
    assert machine("two").refs() == [ref]


# What is refused before any work


@pytest.mark.parametrize("bad", ["s3://key:hush@bucket/prefix", "s3://bucket/prefix?token=hush"])
def test_credentials_in_the_url_are_refused_and_not_told(bad: str):
    makers = (lambda: Store(bad), lambda: parse_recipe(RECIPE | {"runtime": {"store": bad}}))
    for make in makers:
        with pytest.raises(ValueError, match="credentials come from the environment") as caught:
            make()
        assert "hush" not in str(caught.value)


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(ValueError, match=r"runtime\.store: found s3://b/p; .*`pip install 'sft-flow\[s3\]'`"):
        Store("s3://b/p")
    with pytest.raises(ValueError, match=r"zz:// is unknown, expected s3"):
        Store("zz://b/p")


@pytest.mark.parametrize("fault", ["bucket", "read", "write", "network"])
def test_store_that_cannot_be_used_is_told_in_start(
    fault: str, server: ObjectServer, url: str, small_recipe: dict[str, Any], monkeypatch, tmp_path: Path
):
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))
    small_recipe["runtime"]["store"] = "s3://no-such-bucket/x" if fault == "bucket" else url
    server.refuse = {"read": "GET ", "write": "PUT .*probe"}.get(fault, "")
    if fault == "network":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
    told = {"bucket": "bucket does not exist", "network": "Could not connect"}.get(fault, "Access Denied")
    verb = "written" if fault == "write" else "reached"
    try:
        with pytest.raises(
            OSError, match=rf"(?s)the store at s3://.* cannot be {verb} \(.*{told}.*credentials in the env"
        ):
            prepare(parse_recipe(small_recipe))
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()
    assert "not-to-be-told" not in str(Remote(url).__dict__)
