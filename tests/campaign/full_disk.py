"""Disks that are full: the run on a small file system says so, and goes on when there is room."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.campaign.attempts import Attempt
from tests.campaign.kills import WHOLE_S
from tests.campaign.pipeline import files_of, recipe

LARGE = "64m"
_OWN = "SFT_CAMPAIGN_NAMESPACE"
TOLD = ("no space is left for the store at", "training needs")


class Full(NamedTuple):
    """One run. kib: of the disk, or of what another program left on it. message: why the run failed. builds: the
    outputs that there was room for.
    """

    kib: int
    is_told: bool
    message: str
    builds: int
    different: list[str]


def can_mount() -> bool:
    """Whether this process may mount a file system, in a namespace of its own."""
    return sys.platform == "linux" and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


def full_disks(seed: int, number: int, folder: Path, expected: dict[str, str]) -> Iterator[Full]:
    """Runs on disks that have room for a part of the data, and on disks that another program fills meanwhile."""
    rng = random.Random(seed)
    data = sum(path.stat().st_size for path in (folder / "clean" / "store").rglob("*.parquet")) // 1024
    for count in range(number):
        disk = folder / f"disk-{count}"
        if count % 2:
            yield _full(disk, expected, large=True, seconds=rng.uniform(4, 30))
        else:
            yield _full(disk, expected, kib=int(data * rng.uniform(0.05, 1.0)))


def _full(folder: Path, expected: dict[str, str], *, kib: int = 0, large: bool = False, seconds: float = 0.0) -> Full:
    """seconds: until a large disk is filled by another program."""
    shutil.rmtree(folder, ignore_errors=True)
    disk = folder / "disk"
    disk.mkdir(parents=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={LARGE if large else f'{kib}k'}", "tmpfs", str(disk)], check=True
    )
    try:
        data, log, filler = recipe(str(disk / "store")), folder / "log.txt", disk / "filler"
        attempt = Attempt(data, folder)
        if large:
            code = attempt.ended_within(seconds)
            kib = _fill(filler)
        code = attempt.ended_within(WHOLE_S)
        attempt.kill()
        lines = log.read_text(errors="replace").splitlines()
        builds = sum(1 for line in lines if line.startswith("stage=") and " seconds=" in line)
        message = next((line for line in reversed(lines) if any(told in line for told in TOLD)), "")
        filler.unlink(missing_ok=True)
        subprocess.run(["mount", "-o", f"remount,size={LARGE}", str(disk)], check=True)
        again = _ended(data, folder) if code else 0
        found = files_of(disk / "store")
        different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        return Full(kib, (code == 0 or bool(message)) and again == 0, message, builds, different)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def _fill(path: Path) -> int:
    """Writes zeros until the disk is full, and returns how many KiB."""
    block, written = bytes(2**20), 0
    try:
        with path.open("wb", buffering=0) as file:
            while True:
                written += file.write(block)
    except OSError:
        return written // 1024


def _ended(data: dict, folder: Path) -> int | None:
    attempt = Attempt(data, folder)
    code = attempt.ended_within(WHOLE_S)
    attempt.kill()
    return code


def is_in_own_namespace() -> bool:
    return os.environ.get(_OWN) == os.readlink("/proc/self/ns/mnt")


def in_own_namespace() -> None:
    """Starts this program again where its mounts are its own, so that none is left behind."""
    again = f'{_OWN}=$(readlink /proc/self/ns/mnt) exec "$@"'
    program = [sys.executable, "-m", "tests.campaign", *sys.argv[1:]]
    os.execvp("unshare", ["unshare", "-m", "--propagation", "private", "sh", "-c", again, "sh", *program])


def as_row(found: list[Full]) -> tuple[str, str, str]:
    kept = sum(full.is_told and not full.different for full in found)
    return (
        f"{len(found)} disks that are full after {min(full.builds for full in found)} to "
        f"{max(full.builds for full in found)} outputs",
        "the run says so, and with room it ends with the same bits",
        f"{kept} of {len(found)}",
    )


def is_kept(found: list[Full]) -> bool:
    return all(full.is_told and not full.different for full in found)
