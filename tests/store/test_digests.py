"""Digests of a folder's files: of every byte, under the algorithm's name."""

import json
from pathlib import Path

import pytest
import xxhash

from sft_core.store.digests import is_whole, write_digests

NUM_BYTES = 10 * 2**20 + 7  # some blocks, and a part of one


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inner").mkdir()
    (tmp_path / "large.bin").write_bytes(bytes(range(251)) * (NUM_BYTES // 251))
    (tmp_path / "inner" / "empty").touch()
    write_digests(tmp_path)
    return tmp_path


def test_digests_are_xxh3_128_of_each_file(folder: Path):
    found = json.loads((folder / "digests.json").read_text())
    expected = {name: xxhash.xxh3_128_hexdigest((folder / name).read_bytes()) for name in ("inner/empty", "large.bin")}
    assert found == {"algorithm": "xxh3_128", "files": expected}
    write_digests(folder)
    assert json.loads((folder / "digests.json").read_text()) == found, "of the files without the digests"


@pytest.mark.parametrize("place", [0, 4 * 2**20 - 1, 4 * 2**20, 9 * 2**20, -1])
def test_flipped_bit_anywhere_is_found(folder: Path, place: int):
    assert is_whole(folder)
    content = bytearray((folder / "large.bin").read_bytes())
    content[place] ^= 1
    (folder / "large.bin").write_bytes(content)
    assert not is_whole(folder)


def test_file_that_grew_or_went_is_found(folder: Path):
    (folder / "inner" / "empty").write_bytes(b"0")
    assert not is_whole(folder)
    (folder / "inner" / "empty").unlink()
    assert not is_whole(folder)


@pytest.mark.parametrize("text", ["", "{", '{"algorithm": "xxh3_128", "filet": {}}'])
def test_digests_that_say_nothing_make_no_whole_folder(folder: Path, text: str):
    (folder / "digests.json").write_text(text)
    assert not is_whole(folder)
