import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_core.train.checkpoints import check_room, discard_staged, latest, numbered, publish
from tests.train.tiny import Run, tiny_recipe


def stage(tmp_path: Path, step: int) -> Path:
    staged = tmp_path / "staging" / f"checkpoint-{step}"
    (staged / "inner").mkdir(parents=True)
    (staged / "model.safetensors").write_bytes(bytes([step]) * 1000)
    (staged / "inner" / "rng_state.pth").write_bytes(b"state")
    return staged


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Published: checkpoints 9 and 10."""
    folder = tmp_path / "checkpoints"
    for step in (9, 10):
        publish(stage(tmp_path, step), folder, keep=2)
    return folder


def missing_file(checkpoint: Path) -> None:
    (checkpoint / "inner" / "rng_state.pth").unlink()


def flipped_byte(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)


def missing_digests(checkpoint: Path) -> None:
    (checkpoint / "digests.json").unlink()


def half_digests(checkpoint: Path) -> None:
    path = checkpoint / "digests.json"
    path.write_bytes(path.read_bytes()[:20])


def digest_as_before(checkpoint: Path) -> None:
    """digests.json as it was before it named its algorithm: SHA-256, by file name."""
    paths = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != "digests.json"]
    digests = {str(path.relative_to(checkpoint)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    (checkpoint / "digests.json").write_text(json.dumps(digests))


def test_publish_staged_moves_it_whole(folder: Path, tmp_path: Path) -> None:
    checkpoint = folder / "checkpoint-10"
    assert latest(folder) == checkpoint  # by number: 10 is after 9
    assert (checkpoint / "model.safetensors").read_bytes() == b"\x0a" * 1000
    assert (checkpoint / "inner" / "rng_state.pth").read_bytes() == b"state"
    assert not list((tmp_path / "staging").iterdir())


@pytest.mark.parametrize("damage", [missing_file, flipped_byte, missing_digests, half_digests])
def test_latest_torn_is_passed_over_with_a_warning(
    folder: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(folder / "checkpoint-10")
    with caplog.at_level(logging.WARNING):
        assert latest(folder) == folder / "checkpoint-9"
    assert "checkpoint-10 is damaged" in caplog.text


def test_latest_with_digests_of_before_is_compared_with_them(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for checkpoint in numbered(folder):
        digest_as_before(checkpoint)
    assert latest(folder) == folder / "checkpoint-10" and not caplog.records
    flipped_byte(folder / "checkpoint-10")
    assert latest(folder) == folder / "checkpoint-9"
    assert "checkpoint-10 is damaged" in caplog.text


def test_latest_with_digests_of_a_later_version_is_an_error(folder: Path) -> None:
    path = folder / "checkpoint-10" / "digests.json"
    path.write_text(path.read_text().replace("xxh3_128", "of_tomorrow"))
    with pytest.raises(
        ValueError, match=r"found digests by of_tomorrow, expected xxh3_128 or sha256\. A later version"
    ):
        latest(folder)


def test_latest_all_torn_or_none_is_none(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for checkpoint in numbered(folder):
        flipped_byte(checkpoint)
    assert latest(folder) is None
    assert len(caplog.records) == 2
    assert latest(tmp_path / "nothing") is None


def test_latest_staged_is_not_seen(folder: Path, tmp_path: Path) -> None:
    stage(folder, 11)  # a folder inside, as a killed save leaves it
    assert latest(folder) == folder / "checkpoint-10"


def test_publish_rotates_by_number(folder: Path, tmp_path: Path) -> None:
    publish(stage(tmp_path, 11), folder, keep=2)
    assert [path.name for path in numbered(folder)] == ["checkpoint-10", "checkpoint-11"]


def test_publish_over_a_damaged_one_replaces_it(folder: Path, tmp_path: Path) -> None:
    flipped_byte(folder / "checkpoint-10")
    publish(stage(tmp_path, 10), folder, keep=2)
    assert latest(folder) == folder / "checkpoint-10"


def test_publish_drops_the_damaged_ones_after_it(folder: Path, tmp_path: Path) -> None:
    for checkpoint in numbered(folder):
        flipped_byte(checkpoint)
    assert latest(folder) is None, "training begins anew"
    for step in (3, 6):
        publish(stage(tmp_path, step), folder, keep=2)
        assert latest(folder) == folder / f"checkpoint-{step}"
    assert [path.name for path in numbered(folder)] == ["checkpoint-3", "checkpoint-6"]


def test_staging_of_a_killed_run_is_discarded(tmp_path: Path) -> None:
    staged = stage(tmp_path, 3)
    discard_staged(tmp_path / "staging")
    assert not staged.exists()
    discard_staged(tmp_path / "staging")  # nothing there is fine too


def test_full_disk_is_told_before_training(
    train_here: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_room(tmp_path, free // 2)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=300_000))
    with pytest.raises(OSError, match=r"needs 1\.2 MB for .* 300\.0 kB left; .* lower runtime\.keep_checkpoints"):
        train_here(tiny_recipe(), tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    # What a resumed run has on the disk already is not asked for again.
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights").write_bytes(bytes(2_000_000))
    check_room(tmp_path, 2_200_000)
    with pytest.raises(OSError, match="needs"):
        check_room(tmp_path, 2_400_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    train_here(tiny_recipe(training={"max_steps": 1}), tmp_path)
