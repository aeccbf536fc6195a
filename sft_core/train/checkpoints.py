"""Training checkpoints that are complete or absent: staged, digested, renamed. A damaged one is never loaded."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from pathlib import Path

from humanize import naturalsize

from sft_core.store.digests import is_whole, write_digests

log = logging.getLogger(__name__)
LOGS = "logs"
STOP = "stop-requested"


def stop_request(out: Path) -> Path:
    """The file by which a launcher asks its ranks to save and stop."""
    return out / STOP


def save_logs(logs: Path, checkpoint: Path) -> None:
    """Copies the logs so far into a checkpoint: a training that resumes elsewhere goes on with them."""
    (checkpoint / LOGS).mkdir()
    for path in logs.glob("*.jsonl"):
        shutil.copyfile(path, checkpoint / LOGS / path.name)


def restore_logs(checkpoint: Path, logs: Path) -> None:
    """Replaces the logs by those of the checkpoint. Checkpoints of before they had logs leave them as they are."""
    for path in (checkpoint / LOGS).glob("*.jsonl"):
        unfinished = logs / f".unfinished-{path.name}"
        shutil.copyfile(path, unfinished)
        unfinished.replace(logs / path.name)


def check_room(out: Path, num_bytes: int) -> None:
    """Raises OSError when the disk has less than that many bytes for `out`, which may hold a part of them already."""
    here = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    free = shutil.disk_usage(out).free + here
    if free < num_bytes:
        raise OSError(
            errno.ENOSPC,
            f"training needs {naturalsize(num_bytes)} for its checkpoints and the model, and the disk of {out} has "
            f"{naturalsize(free)} left; free some (`sft store gc`), or lower runtime.keep_checkpoints",
        )


def discard_staged(folder: Path) -> None:
    """Removes what a killed run left half-written."""
    shutil.rmtree(folder, ignore_errors=True)


def publish(staged: Path, folder: Path, *, keep: int, best: int | None = None) -> Path:
    """Moves a staged checkpoint-N into `folder`, and removes all but the newest `keep` and that of step `best`.

    Checkpoints after N are removed too: a run trains step N again only because they are damaged, and they would count
    among the newest.
    """
    write_digests(staged)
    folder.mkdir(parents=True, exist_ok=True)
    published = folder / staged.name
    if published.exists():
        shutil.rmtree(published)
    staged.rename(published)  # the digests are inside: a reader sees all of it or nothing
    checkpoints = numbered(folder)
    end = checkpoints.index(published) + 1
    for old in (*checkpoints[: max(0, end - keep)], *checkpoints[end:]):
        if step_of(old) != best:
            shutil.rmtree(old)
    return published


def latest(folder: Path) -> Path | None:
    """The newest checkpoint whose digests match. Skips damaged checkpoints with a warning."""
    for checkpoint in reversed(numbered(folder)):
        if is_whole(checkpoint):
            return checkpoint
        log.warning("checkpoint=%s is damaged and skipped", checkpoint.name)
    return None


def worth_keeping(folder: Path) -> list[Path]:
    """The newest checkpoint, and the best one so far by its trainer state."""
    newest = numbered(folder)[-1:]
    if not newest:
        return []
    best = json.loads((newest[0] / "trainer_state.json").read_text())["best_global_step"]
    return [*newest, *(path for path in numbered(folder)[:-1] if step_of(path) == best)]


def numbered(folder: Path) -> list[Path]:
    """The checkpoints in a folder, in the order of their steps."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(checkpoints, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
