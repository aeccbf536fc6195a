"""What a roll-out resumes from: no checkpoint whose evaluations have lost their weights."""

import json
import shutil
from pathlib import Path

import pytest

from sft_core.search.evaluations import evaluation_folder
from sft_core.search.launch import drop_checkpoints_without_weights


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A roll-out after its checkpoint of step 4, with the weights kept there and those of a later evaluation."""
    (tmp_path / "checkpoints" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "logs").mkdir()
    events = [{"step": 0, "kept": [0]}, {"step": 4, "kept": [0, 2]}, {"step": 6, "kept": [3]}]
    (tmp_path / "logs" / "selection.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    for evaluation in (0, 2, 3):
        evaluation_folder(tmp_path, evaluation).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(("gone", "is_kept"), [(None, True), (3, True), (2, False), (0, False)])
def test_checkpoints_are_dropped_where_weights_that_they_count_on_are_gone(
    out: Path, gone: int | None, is_kept: bool
) -> None:
    if gone is not None:
        shutil.rmtree(evaluation_folder(out, gone))
    drop_checkpoints_without_weights(out)
    assert (out / "checkpoints" / "checkpoint-4").is_dir() == is_kept


def test_nothing_is_dropped_before_the_first_checkpoint(tmp_path: Path) -> None:
    drop_checkpoints_without_weights(tmp_path)
    assert list(tmp_path.iterdir()) == []
