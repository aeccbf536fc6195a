from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sft_core.train.job import ModelLoader, TokenizerLoader
from sft_core.train.models.model import agree_on_special_tokens, load_model, save_checkpoint
from tests.train.tiny import LLAMA, QUICKSTART, Run

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
