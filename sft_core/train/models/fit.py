"""Whether a start model's config, its tokenizer and its adapter fit together, tried without weights."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from sft_core.recipe.wording import nearest, short
from sft_core.train.models.lora import lora_config
from sft_core.train.models.model import num_ids
from sft_core.train.models.small import computes_with_heads, size_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from sft_core.recipe.sections import Lora


def check_class(config: Any, *, trust_remote_code: bool) -> None:
    """Raises ValueError if no class of causal language models takes the config."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    brings_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if brings_code and trust_remote_code:
        return
    if brings_code:
        raise ValueError(
            f"model.trust_remote_code: a {config.model_type} model brings its own code; read it, and set true to run it"
        )
    raise ValueError(
        f"model: transformers has no causal language model for the model_type {config.model_type!r}; choose a model "
        "that writes text from left to right"
    )


def check_vocabulary(config: Any, vocabulary: PreTrainedTokenizerFast, added: list[str], *, in_recipe: bool) -> None:
    """Raises ValueError if the tokenizer has ids for which the model has no row. The recipe's added tokens get rows.

    in_recipe: the recipe has the model's config itself, as model.config.
    """
    rows = config.get_text_config().vocab_size
    if (needed := num_ids(vocabulary, added)) <= rows:
        return
    if in_recipe:
        raise ValueError(
            f"model.config.vocab_size: found {rows}, and the tokenizer {vocabulary.name_or_path} has ids up to "
            f"{needed - 1}; set {needed}"
        )
    beyond = [token for token, index in vocabulary.get_vocab().items() if index >= rows and token not in added]
    raise ValueError(
        f"model.tokenizer_name_or_path: {vocabulary.name_or_path} has ids up to {needed - 1}, and the model has {rows} "
        f"rows; take the model's own tokenizer, or name what is to get new rows in model.add_special_tokens: "
        f"{short(sorted(beyond))}"
    )


def check_heads(config: Any, *, trust_remote_code: bool) -> None:
    """Raises ValueError for numbers of heads with which the class computes nothing.

    Not every class wants heads that divide its sizes. So a number that does not divide is refused only where a small
    model of the class fails with it and runs with one that does.
    """
    try:
        text = config.get_text_config()
        heads, key_heads, hidden = (
            size_of(text, name) for name in ("num_attention_heads", "num_key_value_heads", "hidden_size")
        )
    except Exception:  # transformers' own: layers or parts have numbers of their own, and the config names none of them
        return
    if not heads:
        return
    key_heads = key_heads or heads
    names = {name: text.attribute_map.get(name, name) for name in ("num_attention_heads", "hidden_size")}
    suspects = {
        f"{names['num_attention_heads']} {heads} is no multiple of num_key_value_heads {key_heads}": (key_heads, 0),
        f"{names['hidden_size']} {hidden} is no multiple of {names['num_attention_heads']} {heads}": (
            heads,
            hidden % heads,
        ),
    }
    for name, (tried_key_heads, rest) in suspects.items():
        if heads % tried_key_heads == 0 and rest == 0:
            continue
        runs = (
            computes_with_heads(config, heads, *numbers, trust_remote_code=trust_remote_code)
            for numbers in ((tried_key_heads, rest), (heads, 0))
        )
        if [*runs] == [False, True]:
            raise ValueError(f"model.config: {name}, and a {config.model_type} model computes nothing with that")


def check_targets(lora: Lora, skeleton: Any) -> int:
    """The number of the adapter's weights. Raises ValueError for an adapter that the model cannot have, or that trains
    nothing.

    skeleton: on torch's meta device; the adapter is put into it.
    """
    from peft import get_peft_model

    if lora.lora_dropout == 1:
        raise ValueError("training.lora.lora_dropout: found 1.0; a step drops all that the adapter reads; give less")
    names = [name for name, _ in skeleton.named_modules() if name]
    last = {name.rpartition(".")[2] for name in names}
    targets = () if isinstance(lora.target_modules, str) else lora.target_modules
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ValueError(
                f"training.lora.target_modules: found {target!r}, which no module of the model is called"
                f"{nearest(target, {name for name in last if not name.isdigit()}, otherwise='')}"
            )
    try:
        with torch.device("meta"):
            model = get_peft_model(skeleton, lora_config(lora, skeleton, [], None))  # type: ignore[arg-type]
    except (ValueError, TypeError, RuntimeError, NotImplementedError, re.error) as error:
        raise ValueError(f"training.lora.target_modules: found {lora.target_modules!r}; {error}") from None
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
