"""A folder made from pinned packages: it is there, whole and of the stated identity, or it is not there.

The folder is written beside its target and renamed last, under a file lock, so an interrupted build is never taken for
a complete one and two builds never mix. The identity lies in `made_from.json`, among the data.
"""

import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

IDENTITY_FILE = "made_from.json"


def ensure_folder(target: Path, identity: dict[str, object], build: Callable[[Path], None]) -> bool:
    """Make `target` hold what `build` writes for `identity`; True when it was built, False when it was there already.

    `identity` names all that decides the bytes (packages, settings, digests); JSON values only. A target of another
    identity is replaced. Raises ValueError when `target` exists and is not ours: no folder of the user's is deleted.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _identity_of(target) == identity:
            return False
        partial, previous = (target.parent / f".{target.name}.{state}" for state in ("partial", "previous"))
        for leftover in (partial, previous):  # of a run that was killed; the lock says that nobody writes there
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        build(partial)
        (partial / IDENTITY_FILE).write_text(json.dumps(identity, indent=2) + "\n")
        if target.exists():
            target.rename(previous)
        partial.rename(target)  # Last: a reader must never see half a folder.
        shutil.rmtree(previous, ignore_errors=True)
        return True


def install_packages(requirements: tuple[str, ...], site: Path) -> None:
    """Install exactly `requirements` (pinned; nothing they depend on) into the folder `site`, not the environment."""
    log("install", packages=len(requirements), into="a temporary folder")
    # -qq: pip's warnings tell of the environment, which --target never reads or changes.
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--target", str(site), *requirements], check=True)


def log(event: str, **fields: object) -> None:
    """One event on one line of stdout, key=value."""
    print(event, *(f"{key}={value}" for key, value in fields.items()), flush=True)


def _identity_of(folder: Path) -> object:
    if not folder.exists():
        return None
    path = folder / IDENTITY_FILE
    if not path.exists():
        raise ValueError(
            f"{folder}: found no {IDENTITY_FILE} in it, so it was not written by this script. "
            "Move it away, or name another --out."
        )
    return json.loads(path.read_text())
