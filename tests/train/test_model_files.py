"""Torn weight files and weights that are no numbers are found before any work."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sft_core.pins.pinned import pin
from sft_core.recipe.parse import parse_recipe
from sft_core.store.store import Store
from sft_core.train.finite import NotFiniteError
from sft_core.train.model_files import INDEX, check_files, check_finite, model_folder
from steps.plan import plan
from steps.start import model_warnings
from tests.train.models.test_model import load
from tests.train.tiny import tiny_recipe

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several files, with an index."""
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = load()
    model.save_pretrained(folder, max_shard_size="20KB")
    tokenizer.save_pretrained(folder)
    assert len([*folder.glob("*.safetensors")]) > 2 and (folder / INDEX).is_file()
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def file_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def cut(folder: Path) -> None:
    file = file_of(folder, UP)
    file.write_bytes(file.read_bytes()[:-5])


def empty(folder: Path) -> None:
    file_of(folder, UP).write_bytes(b"")


def pointer(folder: Path) -> None:
    """What a clone without Git LFS leaves."""
    file_of(folder, UP).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def removed(folder: Path) -> None:
    file_of(folder, UP).unlink()


def without_tensor(folder: Path) -> None:
    file = file_of(folder, UP)
    weights = load_file(file)
    del weights[UP]
    save_file(weights, file, metadata={"format": "pt"})


def torn_index(folder: Path) -> None:
    (folder / INDEX).write_text((folder / INDEX).read_text()[:100])


def torn_config(folder: Path) -> None:
    (folder / "config.json").write_text((folder / "config.json").read_text()[:30])


def config_of_nothing(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (torn_config, "config.json: no JSON"),
        (config_of_nothing, "config.json: names no model_type"),
        (cut, "no whole safetensors file .*fetch it again"),
        (empty, "no whole safetensors file"),
        (pointer, "no whole safetensors file"),
        (removed, "names files that are not there: model-0"),
        (without_tensor, f"its files do not have: {UP}"),
        (torn_index, "no index of weights"),
    ],
)
def test_damaged_files_are_refused_before_a_run(damage: Callable[[Path], None], message: str, folder: Path) -> None:
    check_files(folder)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        check_files(folder)


def test_files_that_the_hubs_cache_does_not_have_yet_are_no_damage(folder: Path) -> None:
    removed(folder)
    check_files(folder, is_cache=True)


def test_weights_that_are_not_finite_are_found(folder: Path) -> None:
    check_finite(folder)
    file = file_of(folder, UP)
    weights = load_file(file)
    weights[UP] = weights[UP].to(torch.bfloat16).index_fill(0, torch.tensor([1]), math.nan)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(NotFiniteError, match=f"{file.name}: 1 of 1 tensors hold infinities or NaN: {UP}"):
        check_finite(folder)
    check_finite(folder, within_s=-1.0)  # reads one tensor, and leaves the rest to the loading


def test_a_name_of_the_hub_that_is_not_here_has_no_folder(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_folder("owner/no-such-model", "0" * 40) is None
    assert model_folder(str(whole), None) == whole


@pytest.mark.parametrize("damage", [cut, None])
def test_start_and_plan_look_at_the_files(damage: Any, folder: Path, tmp_path: Path) -> None:
    if damage is not None:
        damage(folder)
    recipe = tiny_recipe(model={"config": None, "model_name_or_path": str(folder)}, runtime={"store": str(tmp_path)})
    pinned = pin(parse_recipe(recipe))
    planned = plan(Store(tmp_path), pinned)
    if damage is None:
        assert model_warnings(planned, pinned) == []
        return
    with pytest.raises(ValueError, match="no whole safetensors file"):
        model_warnings(planned, pinned)
