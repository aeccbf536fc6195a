"""A recipe small enough for any test, and a store in which all its data stages are built."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import NAMES, Browser, executable

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "configs" / "quickstart"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return  # torch takes seconds to import
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The caches of this machine are left alone; the tests have one of their own, and share it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_CACHE", str(shared / "cache"))
        yield


def _small_recipe(store: Path) -> dict[str, Any]:
    sizes = {"vocab_size": 291, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return {
        "name": "small",
        "model": {
            "tokenizer_name_or_path": str(QUICKSTART / "tokenizer"),
            "config": {"model_type": "llama", "num_attention_heads": 1, **sizes},
        },
        "chat_template": {"template": "thinking"},
        "dataset_mixture": {
            "report_share": 0.15,
            "datasets": [{"path": str(QUICKSTART / f"{name}.jsonl")} for name in ("copy_no_think", "checksum_think")],
        },
        "training": {"global_batch_size": 2},
        "runtime": {"store": str(store)},
        "limit": 60,
    }


@pytest.fixture
def small_recipe(tmp_path: Path) -> dict[str, Any]:
    """Plain data of a recipe over two quickstart sources; its store is an empty folder of the test."""
    return _small_recipe(tmp_path / "store")


@pytest.fixture
def save_recipe(tmp_path: Path) -> Callable[..., str]:
    """Writes plain data as a recipe file (JSON is YAML) and gives its path."""

    def save(data: dict[str, Any], name: str = "recipe.yaml") -> str:
        (tmp_path / name).write_text(json.dumps(data))
        return str(tmp_path / name)

    return save


@pytest.fixture(scope="session")
def _built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sft_core.pins.pinned import pin
    from sft_core.recipe.parse import parse_recipe
    from sft_core.store.store import Store
    from steps.pack import PACKED

    root = tmp_path_factory.mktemp("built") / "store"
    Store(root).ensure(PACKED, pin(parse_recipe(_small_recipe(root))))
    return root


@pytest.fixture
def built_recipe(small_recipe: dict[str, Any], _built: Path) -> dict[str, Any]:
    """The small recipe with its outputs up to the packs in its store, a copy of the test's own."""
    shutil.copytree(_built, small_recipe["runtime"]["store"])
    return small_recipe


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium, one for all tests of a worker."""
    if not executable():
        pytest.skip(f"draws pages in a browser: none of {', '.join(NAMES)} is installed")
    with Browser() as found:
        yield found
