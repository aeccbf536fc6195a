"""Which GPUs a share of the tasks gets, and that one process at a time has them."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import time
from pathlib import Path

import pytest

from sft_core.evaluate import gpus as module
from sft_core.evaluate.gpus import gpus_by_themselves, gpus_of_share, visible_gpus
from sft_core.train.accelerator import has_gpu


@pytest.mark.parametrize(
    ("gpus", "size", "expected"),
    [
        (["0", "1", "2"], 1, [["0"], ["1"], ["2"], ["0"]]),
        (["4", "5", "6", "7", "9"], 2, [["4", "5"], ["6", "7"], ["4", "5"]]),
        (["0"], 2, [["0"], ["0"]]),  # too few: what asks for two says so
        ([], 1, [[], []]),
    ],
)
def test_each_share_gets_the_next_gpus(gpus: list[str], size: int, expected: list[list[str]]) -> None:
    assert [gpus_of_share(gpus, share, size) for share in range(len(expected))] == expected


@pytest.mark.parametrize(
    ("named", "num_gpus", "expected"),
    [(None, 3, ["0", "1", "2"]), ("5,GPU-1a,7", 3, ["5", "GPU-1a", "7"]), ("5,9", 1, ["5"]), ("", 0, [])],
)
def test_gpus_are_called_as_the_variable_calls_them(
    monkeypatch: pytest.MonkeyPatch, named: str | None, num_gpus: int, expected: list[str]
) -> None:
    monkeypatch.setattr(module, "has_gpu", lambda: True)
    monkeypatch.setattr(module, "COUNT", f"print({num_gpus})")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == expected


@pytest.mark.skipif(has_gpu(), reason="this machine has a GPU")
def test_machine_without_a_gpu_has_none_and_takes_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert visible_gpus() == []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with gpus_by_themselves([]):
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_torch_that_finds_none_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(module, "has_gpu", lambda: True)  # and torch may be a build without it
    assert len(visible_gpus()) == torch.cuda.device_count()


def hold(path: Path, gpus: list[str], seconds: float) -> None:
    logging.basicConfig(filename=path.with_suffix(".log"), level=logging.INFO, format="%(message)s")
    with gpus_by_themselves(gpus):
        began = time.monotonic()
        time.sleep(seconds)
        path.write_text(f"{began} {time.monotonic()}")


def times_of(tmp_path: Path, *held: list[str]) -> list[tuple[float, float]]:
    """When processes that ask for GPUs at once had them."""
    spawn = multiprocessing.get_context("spawn")
    paths = [tmp_path / f"{number}.txt" for number in range(len(held))]
    processes = [spawn.Process(target=hold, args=(path, gpus, 1.0)) for path, gpus in zip(paths, held, strict=True)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return [tuple(map(float, path.read_text().split())) for path in paths]  # type: ignore[misc]


@pytest.mark.slow
def test_one_process_at_a_time_has_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    # Pairs in either order: each must not wait for what the other has.
    times = sorted(times_of(tmp_path, ["0"], ["1", "0"], ["0", "1"]))
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(times))
    told = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert "waiting: another process scores on GPU 0" in told


@pytest.mark.slow
def test_processes_on_other_gpus_wait_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    times_of(tmp_path, ["0"], ["1"])
    assert [path.read_text() for path in tmp_path.glob("*.log")] == ["", ""]
