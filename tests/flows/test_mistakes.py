"""A user's mistake ends the run at its start, with one message that says what to do."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from sft_core.train.accelerator import has_gpu
from tests.flows.conftest import RECIPE, Project


def test_unknown_key_names_the_nearest_before_the_run_starts(tmp_path: Path) -> None:
    project = Project(tmp_path)
    recipe = copy.deepcopy(RECIPE)
    recipe["training"]["learning_rat"] = recipe["training"].pop("learning_rate")
    project.write(recipe)
    output = project.run("run", succeeds=False)
    assert "training.learning_rat: unknown key; did you mean 'learning_rate'?" in output
    assert "Traceback" not in output
    assert not project.store.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lerning_rate=1", "did you mean 'learning_rate'"),
        ("dataset_mixture.datasets.0.path=missing.jsonl", "missing.jsonl: no such file"),
        ("evaluation.min_report_rows=100", "too few unique report prompts"),
        pytest.param(
            "training.use_liger_kernel=true",
            "needs a GPU, and this machine has none",
            marks=pytest.mark.skipif(has_gpu(), reason="the machine can"),
        ),
    ],
)
def test_bad_override_fails_in_start(tmp_path: Path, override: str, message: str) -> None:
    project = Project(tmp_path)
    recipe = copy.deepcopy(RECIPE)
    del recipe["limit"]
    recipe["dataset_mixture"]["report_share"] = 0.02
    project.write(recipe)
    output = project.run("run", "--set", override, succeeds=False)
    assert message in output
    assert project.builds() == []
