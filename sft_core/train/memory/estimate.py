"""Estimates the memory of training on each GPU and its FLOPs, before anything is loaded."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

from humanize import naturalsize

from sft_core.recipe.rank_strategies import STRATEGIES
from sft_core.train.accelerator import computes_in_half, liger
from sft_core.train.flops import training_flops
from sft_core.train.schedule import largest_divisor, num_steps_of

if TYPE_CHECKING:
    from sft_core.recipe.recipe import PhaseRecipe
    from sft_core.recipe.sections import Runtime, Training
    from sft_core.train.memory.activations import Activations


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on each GPU, and FLOPs of the whole training (None before there are packs)."""

    num_parameters: int
    states: float  # weights, gradients, AdamW's two moments
    packs_a_forward: int  # the most by runtime.tokens_per_forward; 1 for auto, which fits its number into the memory
    activations: Activations | None  # of a forward of full packs whose tokens are all trained
    why_unknown: str | None  # the reason where activations is None
    flops: float | None


def estimate(recipe: PhaseRecipe, shape: Any, plan: Any | None, *, trained_share: float = 1.0) -> Estimate:
    """The estimate for the training of a phase.

    shape: the model without weights (model.skeleton). plan: the packs, where there are any. trained_share: the share of
    the plan's tokens that is trained, for the FLOPs. Activations are those of packs whose tokens are all trained, since
    any pack may be like that.
    """
    from sft_core.train.memory.activations import UnknownActivations

    training, num_parameters = recipe.training, shape.num_parameters()
    states = num_parameters * bytes_a_parameter(recipe.training, recipe.runtime, recipe.model.dtype)
    attention = attention_on_gpu(recipe, shape)
    packs = most_packs_a_forward(recipe, attention)
    flops = None
    if plan is not None:
        epoch = float(training_flops(shape).of_documents(plan.num_tokens, trained_share * plan.num_tokens).sum())
        steps = num_steps_of(len(plan), training.global_batch_size, training.num_train_epochs, training.max_steps)
        flops = epoch * steps / math.ceil(len(plan) / training.global_batch_size)
    try:
        tokens, dtype = packs * recipe.packing.max_length, recipe.model.dtype
        activations = activations_of(training, recipe.runtime, shape, tokens=tokens, dtype=dtype, attention=attention)
        why_unknown = None
    except UnknownActivations as unknown:
        activations, why_unknown = None, str(unknown)
    return Estimate(num_parameters, states, packs, activations, why_unknown, flops)


def bytes_a_parameter(training: Training, runtime: Runtime, dtype: str = "float32") -> float:
    """Bytes of weights, gradients and AdamW's moments on each rank. dtype: of the weights as they are loaded."""
    strategy = STRATEGIES[runtime.distributed]
    whole: float
    shared: float
    whole, shared = strategy.bytes_a_parameter(bf16=training.bf16, dtype=dtype)
    if training.lora is not None:
        in_bf16 = dtype == "bfloat16" or (training.bf16 and strategy.master_weights)
        # NF4 with double quantization (QLoRA, arXiv 2305.14314)
        base = 0.55 if training.lora.load_in_4bit else 2 if in_bf16 else 4
        whole, shared = (0, base) if strategy.shards_weights else (base, 0)
    return whole + shared / runtime.num_ranks


def attention_on_gpu(recipe: PhaseRecipe, shape: Any) -> str:
    """The attention that the model has on a GPU."""
    from sft_core.train.models.attention import VARLEN, allows_varlen

    attention: str = recipe.model.attn_implementation
    if attention != "auto":
        return attention
    takes_varlen = computes_in_half(recipe) and allows_varlen(shape.config, recipe.model.trust_remote_code)
    return VARLEN if takes_varlen else "sdpa"


def most_packs_a_forward(recipe: PhaseRecipe, attention: str) -> int:
    """Packs of a forward by forwards.packs_a_forward, if packs are full. More shorter packs have no more tokens."""
    from sft_core.train.models.attention import KNOWS_DOCUMENTS

    wanted = recipe.runtime.tokens_per_forward
    if wanted == "auto" or attention not in KNOWS_DOCUMENTS:
        return 1
    packs_a_rank = recipe.training.global_batch_size // recipe.runtime.num_data_ranks
    return largest_divisor(packs_a_rank, wanted // recipe.packing.max_length)


def activations_of(
    training: Training, runtime: Runtime, shape: Any, *, tokens: int, dtype: str, attention: str
) -> Activations:
    """The activations of a forward of `tokens` tokens on a GPU. dtype: of the weights. Raises UnknownActivations."""
    from sft_core.train.memory.activations import activation_bytes
    from sft_core.train.models.lora import lora_config

    strategy, lora = STRATEGIES[runtime.distributed], training.lora
    return activation_bytes(
        shape,
        tokens=tokens,
        bf16=training.bf16 and not strategy.master_weights,  # autocast
        dtype="bfloat16" if training.bf16 and strategy.computes_with_bf16_weights else dtype,
        checkpointing=training.gradient_checkpointing,
        attention=attention,
        liger=liger(training.use_liger_kernel),
        lora=lora_config(lora, shape, [], None),
        in_4bit=lora is not None and lora.load_in_4bit,
    )


def estimate_line(needs: Estimate, recipe: PhaseRecipe) -> str:
    """The estimate in one line, for people."""
    size = functools.partial(naturalsize, binary=True)
    flops = "" if needs.flops is None else f"; {needs.flops:.3g} FLOPs in all"
    begin = (
        f"{needs.num_parameters / 1e6:,.1f} M parameters by {recipe.runtime.distributed} on "
        f"{recipe.runtime.num_ranks} rank(s): "
    )
    states = f"{size(needs.states)} for weights, gradients and AdamW"
    if (held := needs.activations) is None:
        return f"{begin}{states} on each; the memory of activations is unknown ({needs.why_unknown}){flops}"
    parts = {
        "the layers": held.layers,
        "16-bit copies of weights": held.weight_copies,
        "the attention's mask": held.mask,
        "the head": held.head,
    }
    packs = "a pack" if needs.packs_a_forward == 1 else f"{needs.packs_a_forward} packs"
    named = ", ".join(f"{size(num_bytes)} of {part}" for part, num_bytes in parts.items() if num_bytes)
    return (
        f"{begin}about {size(needs.states + held.total)} on each, {states}, {size(held.total)} for the activations "
        f"of {packs} of {recipe.packing.max_length:,} tokens ({named}){flops}"
    )
