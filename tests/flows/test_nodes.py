"""Training on several nodes: a gang of tasks, whose ranks train as those of one machine do."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sft_core.pins.pinned import pin
from sft_core.recipe.parse import parse_recipe
from sft_core.store.store import Store
from steps.search import place, progress
from steps.train import TRAINED
from tests.flows.conftest import RECIPE, Project


def trained(folder: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    events = [json.loads(line) for line in (folder / "logs" / "log.jsonl").read_text().splitlines()]
    return events, load_file(folder / "model" / "model.safetensors")


@pytest.mark.long
def test_two_nodes_train_as_two_ranks_of_one_and_need_no_gang_for_what_is_there(tmp_path: Path):
    project, recipe = Project(tmp_path), copy.deepcopy(RECIPE)
    recipe["runtime"] |= {"num_nodes": 2}
    project.write(recipe)
    output = project.run("run")
    assert "/train_on_nodes/" in output
    (folder,) = (project.store / "trained").iterdir()
    events, weights = trained(folder)

    recipe["runtime"] |= {"num_nodes": 1, "num_processes": 2}
    alone = Store(tmp_path / "alone")
    expected_events, expected = trained(alone.path(alone.ensure(TRAINED, pin(parse_recipe(recipe)), round=0)))
    assert [event["loss"] for event in events] == [event["loss"] for event in expected_events]
    assert len(events) == RECIPE["training"]["max_steps"]
    assert all(torch.equal(weights[name], expected[name]) for name in expected)

    recipe["runtime"] |= {"num_nodes": 2, "num_processes": 1}
    pinned = pin(parse_recipe(recipe))
    assert place(alone, progress(alone, pinned)) == "here", "it is there already"
    empty = Store(tmp_path / "empty")
    assert place(empty, progress(empty, pinned)) == "nodes"
