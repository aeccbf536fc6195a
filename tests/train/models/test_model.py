import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sft_core.train.finite import NotFiniteError
from sft_core.train.job import ModelLoader, TokenizerLoader
from sft_core.train.models.model import agree_on_special_tokens, load_model, save_checkpoint, try_save
from tests.train.tiny import LLAMA, QUICKSTART, Run, tiny_recipe

TEMPLATE = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"


def load(*added: str, tied: bool = True, seed: int = 0, path: Path | None = None, eos: str | None = None) -> Any:
    model = ModelLoader(
        path=str(path) if path else None,
        revision=None,
        config=None if path else {**LLAMA, "tie_word_embeddings": tied},
        dtype="float32",
        attn_implementation="sdpa",
        stop_tokens=[],
        trust_remote_code=False,
    )
    tokenizer = TokenizerLoader(
        path=str(QUICKSTART / "tokenizer"),
        revision=None,
        add_special_tokens=list(added),
        eos_token=eos,
        trust_remote_code=False,
    )
    return load_model(model, tokenizer, seed=seed)


@pytest.mark.parametrize("tied", [True, False])
def test_random_weights_are_a_function_of_the_seed(tied: bool) -> None:
    torch.manual_seed(7)
    first, _ = load("<|a|>", tied=tied, seed=3)
    torch.manual_seed(8)
    again, _ = load("<|a|>", tied=tied, seed=3)
    other, _ = load("<|a|>", tied=tied, seed=4)
    names = [name for name, values in first.state_dict().items() if values.ndim > 1]
    assert len(names) > 10
    for name in names:
        assert torch.equal(first.state_dict()[name], again.state_dict()[name]), name
        assert not torch.equal(first.state_dict()[name], other.state_dict()[name]), name


@pytest.mark.parametrize("tied", [True, False])
def test_added_tokens_of_a_pretrained_model_grow_both_embeddings(tied: bool, tmp_path: Path) -> None:
    old, tokenizer = load(tied=tied)
    save_checkpoint(old, tokenizer, None, tmp_path)
    model, grown = load("<|a|>", "<|b|>", path=tmp_path)
    again, _ = load("<|a|>", "<|b|>", path=tmp_path)
    assert len(grown) == len(tokenizer) + 2 == 293
    assert model.config.vocab_size == 293
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert embedding.shape == head.shape == (293, 32)
    assert (embedding is head) == tied
    assert torch.equal(embedding[:291], old.get_input_embeddings().weight)
    assert torch.equal(head[:291], old.get_output_embeddings().weight)
    assert torch.equal(embedding, again.get_input_embeddings().weight)
    assert torch.equal(head, again.get_output_embeddings().weight)
    assert grown.encode("<|a|><|b|>", add_special_tokens=False) == [291, 292]


def test_added_tokens_known_already_grow_nothing() -> None:
    model, tokenizer = load("<|im_start|>")
    assert len(tokenizer) == model.config.vocab_size == 291


def test_embedding_with_spare_rows_is_not_cut(tmp_path: Path) -> None:
    model, tokenizer = load()
    model.resize_token_embeddings(320)
    save_checkpoint(model, tokenizer, None, tmp_path)
    loaded, _ = load("<|a|>", path=tmp_path)
    assert loaded.config.vocab_size == 320


def test_special_tokens_other_stops_of_the_model_are_kept_after_ours() -> None:
    model, tokenizer = load(eos="<|im_end|>")
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=[5, end, 9])
    agree_on_special_tokens(model, tokenizer, ["<|endoftext|>"])
    other = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert model.generation_config.eos_token_id == [end, other, 5, 9]
    assert model.config.eos_token_id == end


def edited(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], tied: bool = False
) -> Path:
    """A saved model whose weights are changed on the disk."""
    model, tokenizer = load(tied=tied)
    save_checkpoint(model, tokenizer, None, folder)
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if k != UP}, f"1 tensors .*files lack {UP}[.] Take"),
        (lambda w: {k.replace("up_proj", "upp"): v for k, v in w.items()}, "2 tensors .*place in the model: .*upp"),
        (
            lambda w: {**w, UP: w[UP][:8].clone()},
            r"Of another shape: .*up_proj.weight \(\[8, 32\] in the file, \[64, 32\]",
        ),
        (lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"}, "files lack lm_head.weight"),
        (lambda w: {f"base.{k}": v for k, v in w.items()}, "21 tensors .* and 13 more.*base.lm_head"),
    ],
    ids=["missing", "renamed", "misshapen", "no head", "prefix"],
)
def test_model_whose_files_do_not_fill_it_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load(path=edited(tmp_path, change))


def test_tensors_without_a_place_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(path=edited(tmp_path, lambda w: {**w, "v_head.weight": torch.ones(3)}))
    assert "1 tensors have no place in the model: v_head.weight" in caplog.text


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match=f"1 of 20 tensors hold infinities or NaN: {UP}"):
        load(path=edited(tmp_path, lambda w: {**w, UP: w[UP].index_fill(1, torch.tensor([3]), value)}, tied=True))


@pytest.mark.parametrize("added", [[], ["<|a|>"]])
def test_release_is_tied_as_what_was_loaded(added: list[str], tmp_path: Path) -> None:
    """Files that have their own head are loaded with it whatever their config says; with it others would tie them."""
    head = torch.arange(291 * 32, dtype=torch.float32).reshape(291, 32)
    model, tokenizer = load(*added, path=edited(tmp_path / "a", lambda w: {**w, "lm_head.weight": head}, tied=True))
    assert model.config.tie_word_embeddings is False
    assert torch.equal(model.get_output_embeddings().weight[:291], head)
    save_checkpoint(model, tokenizer, None, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["tie_word_embeddings"] is False
    again, _ = load(path=tmp_path / "b")
    assert torch.equal(again.get_output_embeddings().weight, model.get_output_embeddings().weight)
    whole, _ = load(path=edited(tmp_path / "c", lambda w: w, tied=True))
    assert (
        whole.config.tie_word_embeddings and whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    )


GENERATION = [
    ({"top_h": 0.4}, ["top_h"]),
    ({"epsilon_cutoff": 3e-4, "eta_cutoff": 1e-3, "temperature": 0.6}, ["temperature", "epsilon_cutoff", "eta_cutoff"]),
    ({"num_beams": 1, "early_stopping": True}, ["early_stopping"]),
    ({"length_penalty": 2.0}, ["length_penalty"]),
    ({"output_scores": True}, ["output_scores"]),
    ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_h": 0.4}, []),
    ({"repetition_penalty": 1.1, "max_length": 99}, []),
]


@pytest.mark.parametrize(("settings", "left_out"), GENERATION, ids=lambda value: "-".join(value))
def test_generation_config_that_cannot_be_saved_is_mended_and_told(
    settings: dict[str, Any], left_out: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = edited(tmp_path / "a", lambda w: w)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 5, **settings}))
    with caplog.at_level("INFO"):
        model, tokenizer = load(path=folder)
    told = [record.message for record in caplog.records if record.message.startswith("generation_config: left out")]
    assert told == (
        [f"generation_config: left out {', '.join(f'{n}={settings[n]}' for n in left_out)}"] if left_out else []
    )
    try_save(model, tokenizer, TEMPLATE, tmp_path / "tried")
    assert not (tmp_path / "tried").exists()
    save_checkpoint(model, tokenizer, TEMPLATE, tmp_path / "b")
    saved = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    kept = {name: value for name, value in settings.items() if name not in left_out and name != "num_beams"}
    assert {name: saved.get(name) for name in kept} == kept and not set(left_out) & set(saved)


def test_config_that_cannot_be_saved_is_found_before_training(
    train_here: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise ValueError("refused")

    monkeypatch.setattr(GenerationConfig, "save_pretrained", refused)
    with pytest.raises(ValueError, match="refused"):
        train_here(tiny_recipe(), tmp_path)
    assert not (tmp_path / "logs" / "log.jsonl").exists() and not [*(tmp_path / "staging").glob("*")]


def test_checkpoint_of_a_run_loads_and_chats(plain_run: Run) -> None:
    model = AutoModelForCausalLM.from_pretrained(plain_run.model)
    tokenizer = AutoTokenizer.from_pretrained(plain_run.model)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end == tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id != end
    assert model.config.use_cache, "a served model without its cache is slow"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "copy: abc"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
        enable_thinking=False,
    )
    text = tokenizer.decode(prompt["input_ids"][0])
    assert "copy: abc" in text
    assert text.count("<|im_start|>") >= 2
    output = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert output.shape[1] > prompt["input_ids"].shape[1]
    saved = load_file(plain_run.model / "model.safetensors")
    assert all(values.dtype == torch.float32 for values in saved.values())


def test_checkpoint_with_its_own_end_token_agrees_everywhere(tmp_path: Path) -> None:
    model, tokenizer = load("<|turn_end|>", eos="<|turn_end|>")
    save_checkpoint(model, tokenizer, TEMPLATE, tmp_path)
    loaded, vocabulary = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert vocabulary.eos_token == "<|turn_end|>"
    assert vocabulary.eos_token_id == 291
    assert loaded.config.eos_token_id == loaded.generation_config.eos_token_id == 291
    chat = vocabulary.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "user:hi<|turn_end|>"
    for name, values in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], values), name
