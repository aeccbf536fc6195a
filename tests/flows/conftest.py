"""A project folder to run the real flow in: a recipe of two small sources, a store, Metaflow's records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "configs" / "quickstart"
TIMEOUT_S = 240

RECIPE = {
    "name": "small",
    "model": {
        "tokenizer_name_or_path": str(DATA / "tokenizer"),
        "config": {
            "model_type": "llama",
            "vocab_size": 291,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "attention_dropout": 0.1,
            "tie_word_embeddings": True,
        },
    },
    "chat_template": {"template": "thinking", "kwargs": {"header": False}},
    "dataset_mixture": {
        "report_share": 0.2,
        "datasets": [
            {"name": "checksum_think", "path": str(DATA / "checksum_think.jsonl")},
            {"name": "checksum_no_think", "path": str(DATA / "checksum_no_think.jsonl")},
        ],
    },
    "packing": {"max_length": 128},
    "training": {"learning_rate": 1e-3, "global_batch_size": 2, "max_steps": 4},
    "evaluation": {"tasks": ["checksum_think"], "max_rows": 8, "min_report_rows": 8, "max_new_tokens": 4},
    "runtime": {"store": "store", "num_threads": 1, "save_steps": 2, "logging_steps": 1},
    "limit": 200,
}


class Project:
    """A folder with recipe.yaml. Everything runs as a new user would: a bare environment, no USER."""

    def __init__(self, folder: Path, source: Path = ROOT):
        self.folder = folder
        self.source = source  # of the flow's code
        self.store = folder / "store"
        self.settings: dict[str, str] = {}  # variables that its user has set

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "OMP_NUM_THREADS": "1",
            **self.settings,
        }

    def write(self, recipe: dict, name: str = "recipe.yaml") -> None:
        with (self.folder / name).open("w") as file:
            YAML(typ="safe", pure=True).dump(recipe, file)

    def command(self, *arguments: str, recipe: str = "recipe.yaml") -> list[str]:
        flow = self.source / "flows" / "sft_flow.py"
        return [sys.executable, str(flow), "--config", "recipe", recipe, *arguments]

    def start(self, command: list[str], log: str = "log.txt") -> subprocess.Popen:
        with (self.folder / log).open("ab") as file:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment | {"PYTHONPATH": str(self.source)},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, *arguments: str, recipe: str = "recipe.yaml", succeeds: bool = True) -> str:
        return self.call(self.command(*arguments, recipe=recipe), succeeds=succeeds)

    def sft(self, *arguments: str, succeeds: bool = True) -> str:
        return self.call([sys.executable, "-m", "steps.cli.main", *arguments], succeeds=succeeds)

    def call(self, command: list[str], *, succeeds: bool = True) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment | {"PYTHONPATH": str(self.source)},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        output = done.stdout + done.stderr
        assert (done.returncode == 0) == succeeds, output[-4000:]
        return done.stdout if succeeds else output

    def builds(self) -> list[dict]:
        """Every build that the store has seen, in order."""
        path = self.store / "builds.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def names(builds: list[dict]) -> Counter[str]:
    """Builds by stage and part, as `tokens copy`."""
    return Counter(" ".join([build["stage"], *map(str, build["part"].values())]) for build in builds)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose first run is finished; the tests after it change things and run again."""
    project = Project(tmp_path_factory.mktemp("project"))
    project.write(RECIPE)
    project.first_output = project.run("run")
    return project
