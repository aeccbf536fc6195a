"""A release of the tiny recipe, made once by the real stages: data, training, scores, model card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from sft_core.pins.pinned import pin
from sft_core.recipe.parse import parse_recipe
from sft_core.store.store import Store
from steps.release import RELEASED
from tests.train.tiny import tiny_recipe


def released_recipe(store: Path) -> dict[str, Any]:
    return tiny_recipe(
        training={"max_steps": 2},
        evaluation={"max_rows": 6, "max_new_tokens": 4},
        runtime={"store": str(store), "eval_batch_size": 6},
    )


@pytest.fixture(scope="session")
def _released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("released") / "store"
    Store(root).ensure(RELEASED, pin(parse_recipe(released_recipe(root))))
    return root


@pytest.fixture
def recipe(_released: Path, tmp_path: Path) -> dict[str, Any]:
    """Plain data; its store, a copy of the test's own, holds everything up to the release."""
    shutil.copytree(_released, tmp_path / "store")
    return released_recipe(tmp_path / "store")
