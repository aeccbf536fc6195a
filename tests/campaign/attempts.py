"""One attempt at the pipeline, in a process group of its own, that may be killed at a moment or at an event."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.campaign.pipeline import ROOT

MARK = "SFT_CAMPAIGN"  # in the environment of every process of an attempt
EVENT = "SFT_CAMPAIGN_EVENT"  # the number of the event of a process below the store at which it kills the group
STORE = "SFT_CAMPAIGN_STORE"
HOOK = Path(__file__).parent / "hook"
LOST_S = 60.0


def _of_flow(recipe: Path) -> list[str]:
    if any((recipe.parent / ".metaflow" / "SFTFlow").glob("[0-9]*/start")):
        return [sys.executable, "-m", "steps.cli.main", "resume"]
    return [sys.executable, str(ROOT / "flows" / "sft_flow.py"), "--config", "recipe", recipe.name, "run"]


class Attempt:
    def __init__(
        self,
        data: dict[str, Any],
        folder: Path,
        *,
        by_flow: bool = False,
        event: int | None = None,
        environment: Mapping[str, str] | None = None,
    ):
        """by_flow: Metaflow runs the steps, and `sft resume` continues them; else the store alone builds what it lacks.

        event: the number of the event, see the hook, at which a process kills the attempt.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path, self.log = folder / "recipe.json", folder / "log.txt"
        path.write_text(json.dumps(data))
        self.mark = uuid.uuid4().hex
        variables = {**os.environ, "OMP_NUM_THREADS": "1", MARK: self.mark, **(environment or {})}
        variables["PYTHONPATH"] = os.pathsep.join(map(str, [HOOK, ROOT] if event is not None else [ROOT]))
        if event is not None:
            variables |= {EVENT: str(event), STORE: data["runtime"]["store"]}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                _of_flow(path) if by_flow else [sys.executable, "-m", "tests.campaign.pipeline", str(path)],
                cwd=folder,
                env=variables,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ended_within(self, seconds: float) -> int | None:
        """The exit code; None where the pipeline still works after that time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """SIGKILL to the process group, as where a machine dies. Raises RuntimeError for a process that lives on."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.wait_for_all()

    def wait_for_all(self) -> None:
        """Waits until no process of the attempt is left: ranks have groups of their own, and die with their parent."""
        end = time.monotonic() + LOST_S
        while left := [process for process in psutil.process_iter() if self._is_mine(process)]:
            if time.monotonic() > end:
                raise RuntimeError(f"processes outlived their parent: {[process.cmdline() for process in left]}")
            time.sleep(0.05)

    def _is_mine(self, process: psutil.Process) -> bool:
        try:
            return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark
        except (psutil.Error, OSError):
            return False
