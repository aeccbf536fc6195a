"""A stranger adds a search strategy: two new modules in a copy of the project, and a recipe that names it trains."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sft_core.pins.pinned import pin
from sft_core.recipe.parse import parse_recipe
from sft_core.recipe.search.registry import STRATEGIES, declared
from sft_core.rounds import ONLY, Rollout, Rounds
from sft_core.search.registry import IMPLEMENTATIONS
from sft_core.store.manifest import sha256_of
from steps.train import TRAINED
from tests.search.test_searching import recipe
from tests.train.tiny import ROOT, SOURCES

SETTINGS = '''"""The settings of turns: one task after another, a few steps each."""

from pydantic import Field

from sft_core.recipe.search.strategy import Needs, Strategy, StrategySettings
from sft_core.recipe.sections import PositiveInt


class TurnsSettings(StrategySettings):
    steps: PositiveInt = Field(2, description="optimizer steps of a task, before the next task's turn")

    @property
    def variant(self) -> str:
        return f"{self.steps} steps"


STRATEGIES = {"turns": Strategy(Needs(packs_by_source=True, any_scheduler=True), settings=TurnsSettings)}
'''
DECIDES = '''"""Turns: the tasks' packs one task after another, each for a few steps."""

import dataclasses

import numpy as np

from sft_core.search.strategies.baselines import sft
from sft_core.search.strategy import Implementation, SamplerInput
from sft_core.train.hooks import Block


@dataclasses.dataclass
class Turns:
    start: SamplerInput
    num_blocks: int = 0

    def next_block(self) -> Block | None:
        steps = self.start.search.settings.steps
        left = self.start.num_steps - steps * self.num_blocks
        if left <= 0:
            return None
        plan, number = self.start.plan, self.num_blocks % len(self.start.tasks)
        packs = [p for p in np.split(np.arange(len(plan.row)), plan.offsets[1:-1]) if self.start.task[p[0]] == number]
        self.num_blocks += 1
        drawn = [packs[place % len(packs)] for place in range(min(steps, left) * self.start.global_batch_size)]
        return [drawn[first :: min(steps, left)] for first in range(min(steps, left))]

    def probes(self) -> None:
        return None

    def learn(self, measured: np.ndarray) -> None:
        assert len(measured) == len(self.start.plan.row)

    def shares(self) -> dict[str, float]:
        turn = self.num_blocks % len(self.start.tasks)
        return {task: float(number == turn) for number, task in enumerate(self.start.tasks)}


IMPLEMENTATIONS = {"turns": Implementation(sft, Turns)}
'''
SCRIPT = """
import json, pathlib, sys
import sft_core.recipe.search
from sft_core.store.manifest import sha256_of
from sft_core.pins.pinned import pin
from sft_core.recipe.parse import parse_recipe
from sft_core.search.journal import CURVES, read_journal
from sft_core.store.store import Store
from steps.mix import MIXTURE
from steps.search import progress
from steps.train import TRAINED
from tests.strangers.test_strategy import section_of

assert pathlib.Path(sft_core.recipe.search.__file__).is_relative_to(pathlib.Path.cwd())
result = {"sections": {strategy: sha256_of(section_of(data)) for strategy, data in json.loads(sys.argv[1]).items()}}
try:
    parse_recipe({**json.loads(sys.argv[3])})
except ValueError as error:
    result["refused"] = str(error)
store, pinned = Store("store"), pin(parse_recipe(json.loads(sys.argv[2])))
store.ensure(MIXTURE, pinned)
store.ensure(TRAINED, progress(store, pinned).pinned, round=0)
state = progress(store, pinned).searches["tuned"]
folder = store.path(store.locate(TRAINED, state.pinned, {"round": 0}).ref)
with (folder / CURVES).open() as file:
    journal = read_journal(file)
result |= {
    "over": state.is_over,
    "title": pinned.recipe.last_phase.search.title,
    "identity": pinned.recipe.last_phase.search.identity,
    "shares": [drawn.shares for drawn in journal.drawn],
    "epochs": [drawn.epochs for drawn in journal.drawn],
    "trained": [[name for name in json.loads(line) if name.startswith("loss/")]
                for line in (folder / "logs" / "log.jsonl").read_text().splitlines()],
}
print(json.dumps(result))
"""


def section_of(data: dict[str, Any]) -> dict[str, Any]:
    """What the first round of a recipe's training is identified by."""
    pinned = pin(parse_recipe(data))
    rounds = Rounds((Rollout(0, None, tuple(pinned.recipe.sources), 2.0),))
    return TRAINED.section(dataclasses.replace(pinned, rounds={ONLY: rounds}), {"round": 0})


@pytest.mark.long
def test_strategy_of_a_stranger_is_two_modules(tmp_path: Path) -> None:
    for package in ("sft_core", "steps", "configs", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "rehearsal", "smollm2")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    (tmp_path / "sft_core" / "recipe" / "search" / "strategies" / "turns.py").write_text(SETTINGS)
    (tmp_path / "sft_core" / "search" / "strategies" / "turns.py").write_text(DECIDES)
    known = {strategy: recipe(strategy=strategy) for strategy in ("sft", "msft", "dynamix", "ies")}
    data = recipe(strategy="turns", turns={"steps": 1})
    data["training"]["lr_scheduler_type"] = "linear"  # which a search that does not know its length refuses
    arguments = [json.dumps(value) for value in (known, data, recipe(strategy="sft", turns={}))]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["sections"] == {strategy: sha256_of(section_of(data)) for strategy, data in known.items()}, (
        "outputs of others' searches would be made again"
    )
    assert result["refused"] == "search: turns: sft does not know it; remove it"
    assert result["over"] and result["title"] == "turns (1 steps)"
    assert result["identity"]["turns"] == {"steps": 1} and result["identity"]["strategy"] == "turns"
    assert len(result["shares"]) >= 3
    for step, shares in enumerate(result["shares"], 1):
        assert shares == {source: float(place == step % 2) for place, source in enumerate(SOURCES)}
    assert result["trained"][:4] == [[f"loss/{SOURCES[step % 2]}"] for step in range(4)]


def test_strategy_of_a_name_that_is_taken_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "strangers_strategies"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for module in ("one", "two"):
        (package / f"{module}.py").write_text("STRATEGIES = {'turns': None}")
    monkeypatch.syspath_prepend(tmp_path)
    import strangers_strategies

    with pytest.raises(ValueError, match=r"strangers_strategies\.two: the strategy 'turns' is declared twice"):
        declared(strangers_strategies, "STRATEGIES", object)


def test_every_strategy_of_a_recipe_has_an_implementation() -> None:
    assert STRATEGIES.keys() == IMPLEMENTATIONS.keys() and len(STRATEGIES) >= 7
