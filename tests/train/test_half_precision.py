"""Whether a model computes in half precision reaches the choice of its attention, in training and in evaluation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_core.evaluate.loading import load_scored
from sft_core.pins.pinned import pin
from sft_core.recipe.parse import parse_recipe
from sft_core.train import assemble
from sft_core.train.job import ModelLoader, TokenizerLoader
from sft_core.train.models import model as loading
from sft_core.train.models.model import load_model, save_checkpoint
from tests.train.tiny import Run, tiny_recipe

PRECISIONS: list[tuple[dict[str, Any], bool]] = [
    ({"training": {"bf16": True}}, True),
    ({"training": {"bf16": False}}, False),
    ({"model": {"dtype": "bfloat16"}}, True),
]


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """The module that chose attention, and the `half` that it gave, a choice each."""
    given: list[tuple[str, bool]] = []
    for module in (assemble, loading):
        choose = module.choose_attention

        def noted(*args: Any, half: bool, module: Any = module, choose: Any = choose, **kwargs: Any) -> str | None:
            given.append((module.__name__.rpartition(".")[2], half))
            return choose(*args, half=half, **kwargs)

        monkeypatch.setattr(module, "choose_attention", noted)
    return given


@pytest.mark.parametrize(("changes", "half"), PRECISIONS, ids=str)
def test_training_chooses_attention_by_its_precision(
    changes: dict[str, Any], half: bool, halves: list[tuple[str, bool]], train_here: Callable[..., Run]
) -> None:
    train_here(tiny_recipe(**{**changes, "training": {"max_steps": 1, **changes.get("training", {})}}))
    assert halves == [("assemble", half), ("model", half)]  # of the class, and of the model that is trained


@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize(
    ("bf16", "dtype"), [(True, "float32"), (False, "float32"), (False, "bfloat16"), (True, "bfloat16")]
)
def test_scoring_chooses_attention_by_training_bf16_alone(
    bf16: bool, dtype: str, from_file: bool, halves: list[tuple[str, bool]], tmp_path: Path
) -> None:
    """Not by the weights' dtype: a checkpoint's loader does not know it, and all models are scored by one attention."""
    pinned = pin(parse_recipe(tiny_recipe(model={"dtype": dtype})))
    model, tokenizer = ModelLoader(**pinned.model_loader), TokenizerLoader(**pinned.tokenizer_loader)
    if from_file:
        network, vocabulary = load_model(model, tokenizer, seed=0)
        save_checkpoint(network, vocabulary, None, tmp_path)
        model = ModelLoader(**{**pinned.model_loader, "path": str(tmp_path), "config": None})
        halves.clear()
    load_scored(model, tokenizer, bf16=bf16, seed=0)
    assert halves == [("model", bf16)]
