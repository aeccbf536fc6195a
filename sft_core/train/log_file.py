"""What happened while training, one JSON object a line; a resumed run takes back what its checkpoint does not know."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any


class LogFile:
    """Events with a `step`, in the order in which they are added."""

    def __init__(self, path: Path):
        self._path = path

    def rewind(self, step: int) -> None:
        """Takes back what came after that step."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a full disk cut the last line short: its step is run again
                if json.loads(line)["step"] <= step:
                    kept.append(line)
        rewritten = self._path.with_suffix(".tmp")
        rewritten.write_text("".join(line + "\n" for line in kept))
        rewritten.replace(self._path)

    def add(self, event: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(event) + "\n")
