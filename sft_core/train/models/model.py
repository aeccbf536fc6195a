"""Loading the start model, and saving a checkpoint that plain transformers loads."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig, PreTrainedModel

from sft_core.data.tokenizer.tokenizer import load_tokenizer
from sft_core.train.job import ModelLoader, TokenizerLoader
from sft_core.train.models.attention import choose_attention

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)


def skeleton(*, path: str | None, revision: str | None, config: dict[str, Any] | None, trust_remote_code: bool) -> Any:
    """The start model without its weights, on torch's meta device: for its config and its number of parameters."""
    settings = read_config(path, revision, config, trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(settings, trust_remote_code=trust_remote_code)


def read_config(path: str | None, revision: str | None, config: dict[str, Any] | None, trust_remote_code: bool) -> Any:
    """The start model's config. Raises OSError or ValueError where there is none that can be read."""
    if config is not None:
        return _random_config(config)
    return AutoConfig.from_pretrained(str(path), revision=revision, trust_remote_code=trust_remote_code)


def load_model(
    model: ModelLoader,
    tokenizer: TokenizerLoader,
    *,
    seed: int,
    load_in_4bit: bool = False,
    half: bool = False,
    device: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The start model and its tokenizer, agreeing on size and end token.

    With `model.config` the weights are random and depend on the seed alone; so do the embeddings of added tokens.
    Weights are read from safetensors only. load_in_4bit: in NF4 with double quantization, for QLoRA. half: the model
    computes in half precision (autocast or weights), which attention kernels require. device: a file's weights are read
    directly to it, without a copy on the CPU. Raises OSError or ValueError if the model cannot be loaded.
    """
    vocabulary = load_tokenizer(**dataclasses.asdict(tokenizer))
    torch.manual_seed(seed)
    trust = model.trust_remote_code
    settings = read_config(model.path, model.revision, model.config, trust)
    options: dict[str, Any] = {"dtype": model.dtype if model.dtype == "auto" else getattr(torch, model.dtype)}
    attention = choose_attention(model.attn_implementation, settings, half=half, trust_remote_code=trust)
    if attention is not None:
        options |= {"attn_implementation": attention}
    if load_in_4bit:
        options |= {"quantization_config": _nf4(), "device_map": {"": int(os.environ.get("LOCAL_RANK", "0"))}}
    if device is not None:
        options["device_map"] = {"": device}
    network: Any
    if model.config is not None:
        network = AutoModelForCausalLM.from_config(settings, **options)
    else:
        network = AutoModelForCausalLM.from_pretrained(
            str(model.path), revision=model.revision, use_safetensors=True, trust_remote_code=trust, **options
        )
    rows = network.get_input_embeddings().num_embeddings
    if len(vocabulary) > rows:
        log.info("embedding grows from %d to %d rows", rows, len(vocabulary))
        network.resize_token_embeddings(len(vocabulary), mean_resizing=model.config is None)
    agree_on_special_tokens(network, vocabulary, model.stop_tokens)
    return network, vocabulary


def _nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _random_config(config: dict[str, Any]) -> Any:
    # A model type's default ids belong to another vocabulary: with them generation stops at an ordinary token.
    settings = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **config}
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def agree_on_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, stop_tokens: list[str]) -> None:
    """The tokenizer's end token is the one at which the model stops, in its config and when it generates."""
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    if tokenizer.bos_token_id is not None:
        model.config.bos_token_id = tokenizer.bos_token_id
    generation = model.generation_config or GenerationConfig()
    known = generation.eos_token_id
    others = [] if known is None else [known] if isinstance(known, int) else list(known)
    stops = list(dict.fromkeys([tokenizer.eos_token_id, *map(tokenizer.convert_tokens_to_ids, stop_tokens), *others]))
    generation.eos_token_id = stops[0] if len(stops) == 1 else stops
    generation.pad_token_id = tokenizer.pad_token_id
    if not generation.do_sample:
        # transformers loads sampling values without do_sample, but refuses to save them in a changed file.
        generation.temperature = generation.top_p = generation.top_k = generation.min_p = generation.typical_p = None
    generation.bos_token_id = model.config.bos_token_id
    model.generation_config = generation


def save_checkpoint(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    chat_template: str | None,
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """A folder for AutoModelForCausalLM and AutoTokenizer, with the template that the rows were rendered with.

    weights: all weights of the model, if this rank holds only a share of them.
    """
    in_training, model.config.use_cache = model.config.use_cache, True
    try:
        model.save_pretrained(folder, state_dict=weights)
    finally:
        model.config.use_cache = in_training
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)


def save_adapter(
    model: Any, weights: dict[str, torch.Tensor] | None, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Writes the LoRA adapter, for peft's PeftModel."""
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
