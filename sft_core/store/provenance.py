"""The version and git commit of the source that runs. Manifests and tags show them; no key depends on them."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import subprocess
from pathlib import Path
from typing import TypedDict

from sft_core.store.code_digest import ROOT

DISTRIBUTION = "sft-flow"
SOURCE = ("flows", "steps", "sft_core", "configs/templates", "configs/accelerate")  # code, and files that it reads
_OTHER_REPOSITORY = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # a git hook sets them, for its own repository
_GIT_S = 10


class SourceCode(TypedDict):
    version: str | None  # None: not installed, as on a cluster that was sent the code alone
    commit: str | None  # None: no git checkout, or git is not installed
    dirty: bool | None  # whether the checkout's source differs from that commit; None without one


@functools.cache
def source_code(root: Path = ROOT) -> SourceCode:
    """The source that this process imported. Read once: the checkout may change while the process runs."""
    try:
        version = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        version = None
    # A folder below somebody else's checkout, such as an environment's, is not that checkout.
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "HEAD") if top is not None and Path(top).resolve() == root.resolve() else None
    if commit is None:
        return {"version": version, "commit": None, "dirty": None}
    changes = _git(root, "status", "--porcelain", "--", *SOURCE)
    return {"version": version, "commit": commit, "dirty": changes is None or changes != ""}


def source_label(source: SourceCode) -> str | None:
    """`abc1234`, `abc1234-dirty`, `0.1.0`, or None when neither commit nor version is known."""
    if source["commit"] is None:
        return source["version"]
    return source["commit"][:7] + ("-dirty" if source["dirty"] else "")


def _git(root: Path, *arguments: str) -> str | None:
    environment = {name: value for name, value in os.environ.items() if name not in _OTHER_REPOSITORY}
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_GIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
