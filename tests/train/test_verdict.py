"""The verdict on a training: each fault is named before any work, and no architecture that trains is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sft_core.train.job import ModelLoader, TokenizerLoader
from sft_core.train.models.config_keys import unknown_keys
from sft_core.train.models.fit import check_class, check_heads
from sft_core.train.models.model import load_model, num_ids
from sft_core.train.verdict import Verdict, try_training
from tests.train.test_probe import KEEPS_APART, LEAKS
from tests.train.tiny import LLAMA, OPT, QUICKSTART, phase_recipe, tiny_recipe

Try = Callable[..., Verdict]
NUM_IDS = 291  # of the quickstart's tokenizer


@pytest.fixture
def verdict(tmp_path: Path) -> Try:
    """The verdict on the tiny recipe with changed sections."""

    def of(*, path: Path | None = None, here: bool = True, **changes: dict[str, Any]) -> Verdict:
        model = {"model_name_or_path": str(path), "config": None} if path is not None else {}
        data = tiny_recipe(**{**changes, "model": {**model, **changes.get("model", {})}})
        recipe = phase_recipe(data)
        settings, out = recipe.model, tmp_path / "out"
        out.mkdir(exist_ok=True)
        loader = ModelLoader(
            path=settings.model_name_or_path,
            revision=None,
            config=settings.config,
            dtype=settings.dtype,
            attn_implementation=settings.attn_implementation,
            stop_tokens=[],
            trust_remote_code=settings.trust_remote_code,
        )
        tokenizer = TokenizerLoader(settings.tokenizer, None, list(settings.add_special_tokens), None, False)
        found = try_training(loader, tokenizer, recipe, recipe.runtime, out, here=here)
        assert list(out.iterdir()) == [], "nothing is written"
        return found

    return of


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA)).save_pretrained(folder)
    return folder


def with_config(folder: Path, copy: Path, **changes: Any) -> Path:
    """A copy of the model's folder whose config.json has other keys; None removes one."""
    copy.mkdir()
    (copy / "model.safetensors").symlink_to(folder / "model.safetensors")
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (copy / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return copy


# What trains today passes


@pytest.mark.long
def test_every_class_of_transformers_knows_its_own_keys_and_heads() -> None:
    """Over all architectures, which nobody has named here."""
    tried, wrong = 0, {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = AutoConfig.for_model(kind)
        except (ValueError, StrictDataclassError):
            continue  # its defaults are not meant to be a model
        tried += 1
        check_class(config, trust_remote_code=False)
        check_heads(config, trust_remote_code=False)
        if unknown := unknown_keys(config, config.to_dict()):
            wrong[kind] = unknown
        assert set(unknown_keys(config, {"hiden_size": 8, "num_hiden_layers": 2})) == {"hiden_size", "num_hiden_layers"}
    assert tried > 150 and wrong == {}


@pytest.mark.long
@pytest.mark.parametrize("kind", [*KEEPS_APART, *LEAKS])
def test_every_architecture_that_the_tests_train_passes(kind: str, verdict: Try) -> None:
    found = verdict(model={"config": {"model_type": kind, **LEAKS.get(kind, {})}})
    assert found.model_type == kind and found.parameters == found.trained_parameters > 0
    assert found.documents_alone is (kind in LEAKS)
    assert found.attention == ("sdpa" if found.attention == "sdpa" else "eager")


@pytest.mark.slow
def test_attention_that_auto_takes_is_what_the_class_has(verdict: Try) -> None:
    """Of those without sdpa."""
    for kind in ("gpt_oss", "gptj", "bloom", "mpt", "mamba"):
        assert verdict(model={"config": {"model_type": kind}}).attention == "eager", kind
    assert verdict().attention == "sdpa"


@pytest.mark.parametrize(
    "training",
    [
        *({"lr_scheduler_type": kind} for kind in ("linear", "constant", "constant_with_warmup", "polynomial")),
        {"lr_scheduler_type": "inverse_sqrt"},
        {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"lr_scheduler_type": "cosine_warmup_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 100}},
        {"max_steps": 1},
        {"max_steps": 2, "warmup_ratio": 1.0},
        {"bf16": True, "gradient_checkpointing": True},
        {"extra": {"optim": "adafactor"}},
        {"extra": {"optim": "sgd", "neftune_noise_alpha": 5.0}},
    ],
    ids=str,
)
def test_training_section_that_trains_passes(training: dict[str, Any], verdict: Try) -> None:
    assert verdict(training=training).warnings == []


def test_adapter_of_any_kind_passes_and_is_counted(verdict: Try) -> None:
    for lora in ({}, {"target_modules": ["q_proj", "v_proj"], "r": 4}, {"use_dora": True}):
        found = verdict(training={"lora": lora})
        assert 0 < found.trained_parameters < found.parameters
    added = verdict(training={"lora": {}}, model={"add_special_tokens": ["<|new|>"]})
    assert added.trained_parameters > 0
    on_gpt2 = verdict(training={"lora": {}}, model={"config": {"model_type": "gpt2", "n_layer": 2}})
    assert on_gpt2.trained_parameters > 0, "its projections are no torch.nn.Linear"


# What cannot train is named


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 64}, "model.config.hiden_size: no key of a llama model; did you mean 'hidden_size'?"),
        ({"model_type": "t5"}, "no causal language model for the model_type 't5'"),
        ({"model_type": "lama"}, "model: its config cannot be read: "),
        ({"hidden_size": 33}, "not a multiple of the number of attention heads"),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "model.config: num_attention_heads 4 is no multiple of num_key_value_heads 3",
        ),
        ({"vocab_size": NUM_IDS - 1}, f"found {NUM_IDS - 1}, and the tokenizer .* has ids up to {NUM_IDS - 1}; set"),
    ],
)
def test_config_that_is_no_model_is_named(changes: dict[str, Any], message: str, verdict: Try) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        verdict(model={"config": {**LLAMA, **changes}})
    assert "faults" not in str(raised.value), "each mistake is one fault"


def test_heads_are_named_as_the_class_names_them(verdict: Try) -> None:
    gpt2 = {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 34}
    with pytest.raises(ValueError, match=r"model\.config: n_embd 34 is no multiple of n_head 4"):
        verdict(model={"config": gpt2})
    assert verdict(model={"config": {**gpt2, "n_embd": 32}}).parameters > 0
    # Qwen3's head size is a key of its own: its hidden size need not divide.
    assert verdict(model={"config": {**LLAMA, "model_type": "qwen3", "hidden_size": 33, "head_dim": 16}}).parameters


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"extra": {"adam_beta2": 1.5}}, r"training\.extra\.adam_beta2: found 1\.5; Invalid beta"),
        ({"extra": {"optim": "adamw_bnb_8bit"}}, r"training\.extra\.optim: found 'adamw_bnb_8bit'; .*bitsandbytes"),
        ({"extra": {"optim": "adam_w"}}, "SFTConfig refuses the section with training.extra .*adam_w"),
        ({"extra": {"dataloader_prefetch_factor": 2}}, "SFTConfig refuses .*dataloader_prefetch_factor"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_ratio": 0.1}},
            r"lr_scheduler_kwargs\.min_lr_ratio: no setting of the scheduler .*; did you mean 'min_lr_rate'",
        ),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs: found {} for .* min_lr_rate should be set"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "missing 1 required .*num_decay_steps"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 3.0}},
            "the learning rate is .* at step .*, which is the highest one",
        ),
        (
            {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
            "no setting of the scheduler constant, which has none",
        ),
        ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-8}, "must be smaller than initial lr"),
        ({"lora": {"target_modules": ["q_proj", "vproj"]}}, r"lora\.target_modules: found 'vproj', .*mean 'v_proj'"),
        ({"lora": {"target_modules": "attention.*"}}, r"lora\.target_modules: found 'attention\.\*'"),
        ({"lora": {"lora_dropout": 1.0}}, r"lora\.lora_dropout: found 1\.0; a step drops all"),
        ({"router_aux_loss_coef": 0.1}, r"training\.router_aux_loss_coef: found 0\.1"),
    ],
)
def test_training_section_that_cannot_train_is_named(training: dict[str, Any], message: str, verdict: Try) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        verdict(training=training)
    assert "faults" not in str(raised.value)


def test_attention_that_the_class_lacks_is_named_with_those_that_it_has(verdict: Try) -> None:
    with pytest.raises(ValueError, match="found 'sdpa', with which a gpt_oss model does not run; it runs with eager"):
        verdict(model={"config": {"model_type": "gpt_oss"}, "attn_implementation": "sdpa"})


def test_all_faults_are_named_at_once(verdict: Try) -> None:
    training = {"extra": {"adam_beta2": 1.5}, "lora": {"target_modules": ["vproj"]}}
    with pytest.raises(ValueError, match="4 faults, each of which ends a training") as raised:
        verdict(model={"config": {**LLAMA, "hiden_size": 64, "vocab_size": 10}}, training=training)
    assert all(name in str(raised.value) for name in ("hiden_size", "vocab_size", "adam_beta2", "vproj"))


def test_what_belongs_to_a_gpu_elsewhere_is_no_fault_here(verdict: Try) -> None:
    extra = {"dataloader_prefetch_factor": 16, "tf32": True}
    assert verdict(here=False, training={"extra": extra, "use_liger_kernel": True}).parameters > 0
    flash = {"attn_implementation": "flash_attention_2"}
    assert verdict(here=False, model=flash, training={"bf16": True}).attention == "flash_attention_2"


def test_pack_longer_than_the_context_is_a_warning(verdict: Try) -> None:
    (warning,) = verdict(packing={"max_length": 513}).warnings
    assert "packing.max_length 513: the model was made for 512 tokens" in warning
    assert verdict(packing={"max_length": 512}).warnings == []


def test_documents_that_see_each_other_are_a_warning(verdict: Try) -> None:
    found = verdict(model={"config": OPT})
    assert found.documents_alone and "documents of a pack see each other" in found.warnings[0]
    assert "each in its own forward" in found.line and "opt of" in found.line


# A published model


def test_published_model_passes_and_a_misspelt_key_of_it_is_a_warning(
    saved: Path, verdict: Try, tmp_path: Path
) -> None:
    assert verdict(path=saved).warnings == []
    odd = with_config(saved, tmp_path / "odd", hiden_size=32, _name="x", is_llama_config=True)
    (warning,) = verdict(path=odd).warnings
    assert warning == "config.json: hiden_size is no key of a llama model, which has hidden_size"


def test_published_model_with_too_small_a_vocabulary_is_named(saved: Path, verdict: Try, tmp_path: Path) -> None:
    smaller = with_config(saved, tmp_path / "smaller", vocab_size=NUM_IDS - 2)
    with pytest.raises(ValueError, match=rf"model\.tokenizer_name_or_path: .* has ids up to {NUM_IDS - 1}, and the"):
        verdict(path=smaller)
    added = {"add_special_tokens": ["<|new|>"]}
    assert verdict(path=saved, model=added).warnings == [], "the embedding grows with tokens that the recipe adds"


def test_model_with_code_of_its_own_is_told_by_the_recipes_key(saved: Path, verdict: Try, tmp_path: Path) -> None:
    code = {"AutoConfig": "configuration_mine.Config", "AutoModelForCausalLM": "modeling_mine.Model"}
    brings = with_config(saved, tmp_path / "brings", model_type="mine", auto_map=code)
    with pytest.raises(ValueError, match=r"model\.trust_remote_code: the model brings its own code"):
        verdict(path=brings)
    alien = with_config(saved, tmp_path / "alien", model_type="t5", auto_map=code)
    with pytest.raises(ValueError, match=r"model\.trust_remote_code: a t5 model brings its own code"):
        verdict(path=alien)


def test_weights_that_are_not_finite_are_named(saved: Path, verdict: Try, tmp_path: Path) -> None:
    broken = with_config(saved, tmp_path / "broken")
    weights = load_file(saved / "model.safetensors")
    name = sorted(weights)[0]
    weights[name] = weights[name].index_fill(0, torch.tensor([0]), math.nan)
    (broken / "model.safetensors").unlink()
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"1 of .* tensors hold infinities or NaN: {name}"):
        verdict(path=broken)


# Ids with holes


@pytest.mark.slow
def test_vocabulary_with_holes_gets_a_row_for_its_highest_id(tmp_path: Path) -> None:
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {character: 2 * number for number, character in enumerate(characters)} | {"<|end|>": 999}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(tmp_path)
    loader = ModelLoader(None, None, LLAMA, "float32", "auto", [], False)
    model, vocabulary = load_model(loader, TokenizerLoader(str(tmp_path), None, [], None, False), seed=0)
    assert len(vocabulary) == len(ids) < num_ids(vocabulary) == 1000
    assert model.get_input_embeddings().num_embeddings == 1000
    assert num_ids(vocabulary, ["<|end|>"]) == 2 * len(characters) - 1
    quickstart = TokenizerLoader(str(QUICKSTART / "tokenizer"), None, [], None, False)
    assert num_ids(load_model(loader, quickstart, seed=0)[1]) == NUM_IDS
