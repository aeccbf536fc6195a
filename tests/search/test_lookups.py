"""A search of many rounds looks each output up once, however often its rounds lead through the same ones."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from sft_core.pins.pinned import pin
from sft_core.recipe.parse import parse_recipe
from sft_core.rounds import ONLY
from sft_core.search.journal import Cost, Journal, write_journal
from sft_core.store.stage import Build
from sft_core.store.store import Store
from steps.mix import MIXTURE
from steps.plan import plan
from steps.search import progress
from steps.train import TRAINED
from tests.search.scripted import curves
from tests.train.tiny import QUICKSTART, tiny_recipe

NUM_TASKS = 20  # the strategy `continual` makes a round of each
TASKS = [f"task_{number:02}" for number in range(NUM_TASKS)]


def trained_by_script(build: Build, *, job: Any, round: int) -> dict[str, Any]:
    """Each round is better than those before it, and best at its second evaluation."""
    write_journal(
        build.out,
        Journal(curves({task: [round + gain for gain in (0.0, 0.8, 0.5)] for task in TASKS}), Cost(1.0, 1.0, 1, 1), []),
    )
    return {"steps": 1}


@pytest.mark.slow
def test_search_of_20_rounds_looks_each_output_up_once_for_each_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny_recipe(
        dataset_mixture={
            "datasets": [{"path": str(QUICKSTART / "copy_no_think.jsonl"), "name": task} for task in TASKS]
        },
        training={"lr_scheduler_type": "constant"},
        search={"strategy": "continual", "epochs_per_rollout": 2.0, "evaluations_per_epoch": 2},
        runtime={"store": str(tmp_path / "store"), "num_workers": 1},
    )
    del data["training"]["num_train_epochs"]
    data["limit"] = 20
    pinned, store = pin(parse_recipe(data)), Store(tmp_path / "store")
    store.ensure(MIXTURE, pinned)
    scripted = dataclasses.replace(TRAINED, build=trained_by_script)  # its outputs have the same keys
    while not (search := progress(store, pinned).searches[ONLY]).is_over:
        store.ensure(scripted, search.pinned, round=len(search.rounds.rollouts) - 1)
    assert len(search.rounds.rollouts) == NUM_TASKS

    located, locate = [], Store.locate
    monkeypatch.setattr(Store, "locate", lambda self, *arguments: (located.append(1), locate(self, *arguments))[1])
    known = progress(store, pinned).searches[ONLY].pinned
    of_progress = len(located)
    outputs = plan(store, pinned)
    inputs = [needed for each in outputs for needed in each.stage.inputs(known, each.part)]
    assert sum(each.stage is TRAINED and each.status == "hit" for each in outputs) == NUM_TASKS
    # A round reads all rounds before it, so the graph has far more paths than the square of the rounds.
    assert of_progress <= len(outputs) + len(inputs) + NUM_TASKS
    assert len(located) - of_progress <= of_progress + len(outputs) + len(inputs)
