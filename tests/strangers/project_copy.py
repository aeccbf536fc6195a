"""A copy of the project to which a test adds files, and Python processes that see the copy alone."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("sft_core", "steps", "configs/accelerate", "configs/templates")
CHECK = "import sft_core, pathlib; assert pathlib.Path(sft_core.__file__).parents[1] == pathlib.Path.cwd()\n"


def copy_project(folder: Path) -> Path:
    """The packages and what they read, without anything that an editable install could mix in."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run_python(project: Path, script: str, *arguments: object) -> str:
    """What a script prints that runs in the copy. Raises AssertionError with its errors."""
    done = subprocess.run(
        [sys.executable, "-c", CHECK + textwrap.dedent(script), *map(str, arguments)],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_json(project: Path, script: str, data: Any) -> Any:
    """The last line that a script prints, as JSON. The script finds `data` as JSON in its first argument."""
    return json.loads(run_python(project, script, json.dumps(data)).splitlines()[-1])
