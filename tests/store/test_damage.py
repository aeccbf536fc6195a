"""Damaged outputs: a flipped byte, a missing file or an altered manifest is found, and says what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_core.store.manifest import CorruptOutput
from sft_core.store.ref import Ref
from sft_core.store.stage import Build, Stage
from sft_core.store.store import Store
from tests.store.test_store import NUMBERS, SUM, stage_of, toy


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def flip_first_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["numbers.txt", "logs/log.txt"])
def test_verify_a_flipped_byte_or_a_missing_file_is_found(store: Store, name: str):
    ref = store.ensure(NUMBERS, toy())
    store.verify(ref)
    path = store.path(ref) / name
    flip_first_byte(path)
    with pytest.raises(CorruptOutput, match=rf"{ref}: {name} has \d+ bytes with another digest .*sft store gc {ref}"):
        store.verify(ref)
    path.unlink()
    with pytest.raises(CorruptOutput, match=f"{name} is missing"):
        store.verify(ref)


KEYS = ("content", "identity_sha256", "identity", "files", "counts", "inputs", "created", "seconds", "ref", "made_by")


@pytest.mark.parametrize("key", KEYS)
def test_verify_a_manifest_that_contradicts_itself_is_found(store: Store, key: str):
    ref = store.ensure(NUMBERS, toy())
    path = store.path(ref) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest[key] = manifest[key][::-1] if isinstance(manifest[key], str) else {} if manifest[key] else {"another": 1}
    path.write_text(json.dumps(manifest))
    with pytest.raises(CorruptOutput, match=r"manifest\.json is not what was written"):
        store.verify(ref)


def test_manifest_of_before_the_digest_of_all_is_verified_by_the_others(store: Store):
    ref = store.ensure(NUMBERS, toy())
    path = store.path(ref) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    path.write_text(json.dumps(manifest))
    store.verify(ref)


def test_counts_with_numbers_as_keys_are_verified(store: Store):
    def build_by_number(build: Build) -> dict[str, Any]:
        return {"by_length": {9: 1, 10: (2, 3)}}

    ref = store.ensure(Stage("numbered", build_by_number, lambda pinned, part: {}, version=1), toy())
    store.verify(ref)
    assert store.manifest(ref)["counts"] == {"by_length": {"9": 1, "10": [2, 3]}}


def test_files_that_no_builder_put_there_are_named(store: Store):
    ref = store.ensure(NUMBERS, toy())
    assert store.foreign(ref) == []
    (store.path(ref) / "logs" / "notes.txt").write_text("mine")
    store.verify(ref)
    assert store.foreign(ref) == ["logs/notes.txt"]


def test_manifest_cut_short_is_corrupt_and_can_still_be_removed(store: Store):
    ref = store.ensure(NUMBERS, toy())
    path = store.path(ref) / "manifest.json"
    path.write_text(path.read_text()[:40])
    for call in (store.verify, store.manifest):
        with pytest.raises(CorruptOutput, match=rf"{ref}: manifest\.json cannot be read"):
            call(ref)
    assert store.refs() == [ref] and store.num_bytes(ref) > 0
    store.remove(ref)
    assert store.ensure(NUMBERS, toy()) == ref


def test_ensure_damaged_input_is_found_before_any_stage_reads_it(store: Store):
    started = []

    def build(build: Build) -> dict[str, Any]:
        started.append(build.out)
        return {}

    numbers = store.ensure(NUMBERS, toy())
    store.ensure(SUM, toy())  # found whole by this process, and damaged after that
    flip_first_byte(store.path(numbers) / "numbers.txt")
    with pytest.raises(CorruptOutput, match=f"{numbers}: numbers.txt has 1 bytes with another digest"):
        store.ensure(stage_of(build, needs=SUM.needs), toy())
    assert started == []


def test_ensure_a_file_that_the_stage_does_not_read_may_be_damaged(store: Store):
    numbers = store.ensure(NUMBERS, toy())
    flip_first_byte(store.path(numbers) / "logs" / "log.txt")
    stage = stage_of(lambda build: {}, needs=SUM.needs, reads={"numbers": ["*.txt"]})
    with pytest.raises(CorruptOutput, match=r"log\.txt"):
        store.ensure(stage, toy())  # * is for any part of a name
    store.ensure(stage_of(lambda build: {}, needs=SUM.needs, reads={"numbers": ["numbers.txt"]}), toy())


@pytest.mark.parametrize("read", [Store.read, lambda store, ref, name: store.open(ref, name).read()])
def test_read_damaged_file_is_found(store: Store, read: Callable[[Store, Ref, str], bytes]):
    numbers = store.ensure(NUMBERS, toy())
    whole = read(store, numbers, "numbers.txt")
    assert whole == (store.path(numbers) / "numbers.txt").read_bytes()
    flip_first_byte(store.path(numbers) / "numbers.txt")
    with pytest.raises(CorruptOutput, match=r"numbers\.txt has 1 bytes with another digest"):
        read(store, numbers, "numbers.txt")


def test_manifest_of_before_the_fast_digests_is_verified_by_sha256(store: Store):
    ref = store.ensure(NUMBERS, toy())
    path = store.path(ref) / "manifest.json"
    manifest = json.loads(path.read_text())
    for entry in manifest["files"].values():
        del entry["xxh3_128"]
    del manifest["sha256"]
    path.write_text(json.dumps(manifest))
    assert Store(store.root).path(ref)
    flip_first_byte(store.path(ref) / "numbers.txt")
    for call in (store.verify, store.path):
        with pytest.raises(CorruptOutput, match="written: 1 bytes, sha256 "):
            call(ref)
