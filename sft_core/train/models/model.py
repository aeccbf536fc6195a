"""Loading the start model, and saving a checkpoint that plain transformers loads."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig, PreTrainedModel

from sft_core.data.tokenizer.tokenizer import load_tokenizer
from sft_core.recipe.wording import some
from sft_core.train.finite import check_weights
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
    directly to it, without a copy on the CPU. Raises OSError or ValueError if the model cannot be loaded, also where
    its files lack a tensor of the model or have one of another shape; NotFiniteError for weights that are not finite.
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
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(model.path),
            revision=model.revision,
            use_safetensors=True,
            trust_remote_code=trust,
            ignore_mismatched_sizes=True,  # check_loaded names them
            output_loading_info=True,
            **options,
        )
        network, loading = loaded
        check_loaded(str(model.path), loading)
        check_weights(network.named_parameters(), str(model.path))
        agree_on_ties(network)
    rows = network.get_input_embeddings().num_embeddings
    if (needed := num_ids(vocabulary)) > rows:
        log.info("embedding grows from %d to %d rows", rows, needed)
        network.resize_token_embeddings(needed, mean_resizing=model.config is None)
    agree_on_special_tokens(network, vocabulary, model.stop_tokens)
    return network, vocabulary


def num_ids(vocabulary: PreTrainedTokenizerFast, without: Collection[str] = ()) -> int:
    """The rows of an embedding that has each id: the ids of a vocabulary may have holes, so their number says less.

    without: tokens that do not count.
    """
    return 1 + max(index for token, index in vocabulary.get_vocab().items() if token not in without)


def check_loaded(path: str, loading: dict[str, Any]) -> None:
    """Raises ValueError where the files did not fill the model: transformers leaves random numbers in their place.

    loading: the loading info of transformers. Tensors without a place in the model are logged: heads for other tasks
    have none.
    """
    missing, unexpected = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    misshapen = [
        f"{name} ({[*stored]} in the file, {[*wanted]} in the model)"
        for name, stored, wanted in sorted(loading["mismatched_keys"])
    ]
    if unexpected:
        log.warning("%s: %d tensors have no place in the model: %s", path, len(unexpected), some(unexpected))
    if misshapen or missing:
        raise ValueError(
            f"{path}: {len(missing) + len(misshapen)} tensors of the model would start as random numbers. "
            + (f"Its files lack {some(missing)}. " if missing else "")
            + (f"Of another shape: {some(misshapen)}. " if misshapen else "")
            + (f"Its files have, without a place in the model: {some(unexpected)}. " if unexpected else "")
            + "Take the whole checkpoint, and the config.json that belongs to its weights"
        )


def agree_on_ties(model: PreTrainedModel) -> None:
    """Sets the config's tie_word_embeddings to what was loaded: a file may have a head of its own in spite of it.

    Other software ties by the config alone, and so does transformers when it resizes embeddings.
    """
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if inputs is None or outputs is None:
        return
    is_tied = inputs.weight is outputs.weight
    if bool(model.config.tie_word_embeddings) != is_tied:
        log.info("tie_word_embeddings=%s: the files have %s head", is_tied, "no" if is_tied else "their own")
        model.config.tie_word_embeddings = is_tied


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
    generation.bos_token_id = model.config.bos_token_id
    model.generation_config = saveable(generation)


def saveable(generation: GenerationConfig) -> GenerationConfig:
    """The config without the settings for which transformers would refuse to save it, as temperature without do_sample.

    transformers loads such a config, and saves it as long as nothing of it is changed.
    """
    try:
        generation.validate(strict=True)
    except ValueError as error:
        names = re.findall(r"^- `(\w+)`:", str(error), re.MULTILINE)
        log.info("generation_config: left out %s", ", ".join(f"{name}={getattr(generation, name)}" for name in names))
        for name in names:
            setattr(generation, name, None)
        generation.validate(strict=True)
    return generation


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


def try_save(model: Any, tokenizer: PreTrainedTokenizerFast, chat_template: str | None, folder: Path) -> None:
    """Saves a checkpoint without weights and removes it: a config that cannot be saved is found before training."""
    try:
        save_checkpoint(model, tokenizer, chat_template, folder, {})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save_adapter(
    model: Any, weights: dict[str, torch.Tensor] | None, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Writes the LoRA adapter, for peft's PeftModel."""
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
