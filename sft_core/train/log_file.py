"""Logs of training, one JSON object a line. A resumed run removes the lines after its checkpoint's step."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events so far. Skips incomplete lines: one being written, or one cut short by a full disk."""
    events = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return events


class LogFile:
    """Events with a `step`, in the order in which they are added."""

    def __init__(self, path: Path):
        self._path = path

    def rewind(self, step: int) -> None:
        """Removes the events after that step."""
        if not self._path.exists():
            return
        kept = [event for event in read_events(self._path) if event["step"] <= step]
        rewritten = self._path.with_suffix(".tmp")
        rewritten.write_text("".join(json.dumps(event) + "\n" for event in kept))
        rewritten.replace(self._path)

    def add(self, event: Mapping[str, object]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(event) + "\n")
