"""LoRA through the real trainer, with an end token that the vocabulary did not have."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sft_core.train.job import ModelLoader, TokenizerLoader
from sft_core.train.models.model import load_model
from tests.train.tiny import LLAMA, ROOT, Run, tiny_recipe

END = "<|turn_end|>"
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}


def recipe(folder: Path, *, tied: bool, **lora: Any) -> dict[str, Any]:
    template = folder / "turn_end.jinja"
    text = (ROOT / "configs" / "templates" / "thinking.jinja").read_text()
    assert "<|im_end|>" in text
    template.write_text(text.replace("<|im_end|>", END))
    return tiny_recipe(
        model={"config": {**LLAMA, "tie_word_embeddings": tied}, "add_special_tokens": [END], "eos_token": END},
        chat_template={"template": str(template)},
        training={"lora": {**LORA, **lora}, "max_steps": 3},
        runtime={"save_steps": 2},
    )


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def run(
    request: pytest.FixtureRequest,
    train_here: Callable[..., Run],
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    return train_here(recipe(tmp_path_factory.mktemp("template"), tied=request.param))


def base_of(run: Run) -> PreTrainedModel:
    pinned = run.pinned
    seed = pinned.recipe.last_phase.training.seed
    return load_model(ModelLoader(**pinned.model_loader), TokenizerLoader(**pinned.tokenizer_loader), seed=seed)[
        0
    ].eval()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["use_dora", "use_rslora"])
def test_lora_variants_reach_the_adapter_and_the_merged_checkpoint(
    variant: str, train_here: Callable[..., Run], tmp_path: Path
) -> None:
    run = train_here(recipe(tmp_path, tied=True, **{variant: True}))
    settings = json.loads((run.model / "adapter" / "adapter_config.json").read_text())
    assert {name: settings[name] for name in ("use_dora", "use_rslora")} == {"use_dora": False, "use_rslora": False} | {
        variant: True
    }
    check_merged(run)


@pytest.mark.slow
def test_lora_merged_checkpoint_is_the_adapter_on_the_base(run: Run) -> None:
    check_merged(run)


@torch.no_grad()
def check_merged(run: Run) -> None:
    ids = torch.arange(280, 292)[None]
    merged = AutoModelForCausalLM.from_pretrained(run.model).eval()
    base = base_of(run)
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, run.model / "adapter").eval()
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)
    assert (merged(ids).logits - before).abs().max() > 1e-2, "nothing was learned"


def test_lora_weights_only_targets_and_embeddings_change(run: Run) -> None:
    before = base_of(run).state_dict()
    after = load_file(run.model / "model.safetensors")
    tied = before["lm_head.weight"].equal(before["model.embed_tokens.weight"])
    assert set(after) == set(before) - ({"lm_head.weight"} if tied else set())
    changed = {name for name, values in after.items() if not values.equal(before[name])}
    linear = {name for name in after if name.endswith("_proj.weight")}
    assert len(linear) == 14
    embeddings = {name for name in after if name in ("lm_head.weight", "model.embed_tokens.weight")}
    assert changed == linear | embeddings


def test_lora_added_end_token_rows_are_trained_and_saved(run: Run) -> None:
    before, after = base_of(run).state_dict(), load_file(run.model / "model.safetensors")
    names = [name for name in ("lm_head.weight", "model.embed_tokens.weight") if name in after]
    assert len(names) == (1 if run.pinned.recipe.model.config["tie_word_embeddings"] else 2)  # type: ignore[index]
    for name in names:
        assert after[name].shape[0] == 292
        # AdamW moves a weight by about the learning rate (1e-2) a step.
        assert (after[name][291] - before[name][291]).abs().max() > 1e-2
    if len(names) == 1:
        assert after[names[0]][:291].equal(before[names[0]][:291]), "with tied weights the other rows stay"
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    model = AutoModelForCausalLM.from_pretrained(run.model)
    assert tokenizer.convert_tokens_to_ids(END) == 291
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id == 291
    assert END in tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)


@pytest.mark.slow
def test_lora_target_modules_named_are_the_ones_adapted(train_here: Callable[..., Run], tmp_path: Path) -> None:
    changes = recipe(tmp_path, tied=True, target_modules=["q_proj"])
    changes["training"]["max_steps"] = 1
    run = train_here(changes)
    names = load_file(run.model / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in names if "lora" in name} == {"q_proj"}
