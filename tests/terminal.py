"""A command in a terminal: what it writes there, byte for byte."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def in_terminal(*arguments: str) -> str:
    """The output of a Python process whose standard output and error are a terminal of 200 columns."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"}
    with subprocess.Popen(
        [sys.executable, *arguments], stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, env=environment
    ):
        os.close(slave)
        chunks = []
        while True:
            try:
                chunk = os.read(master, 65536)
            except OSError:  # the process has ended
                break
            if not chunk:
                break
            chunks.append(chunk)
    os.close(master)
    return b"".join(chunks).decode().replace("\r\n", "\n")  # a terminal begins a line after each line feed


def without_colours(text: str) -> str:
    """What is left when the colours of a style are taken away."""
    return COLOUR.sub("", text)
