"""What training will take of a GPU's memory and how much it computes, before anything is loaded."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

from humanize import naturalsize

from sft_core.train.accelerator import computes_in_half, liger
from sft_core.train.flops import training_flops
from sft_core.train.schedule import num_steps_of

if TYPE_CHECKING:
    from sft_core.recipe import Recipe
    from sft_core.sections import Runtime, Training
    from sft_core.train.activations import Activations


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on each GPU, and FLOPs of the whole training (None: not known before there are packs)."""

    num_parameters: int
    states: float  # weights, gradients, AdamW's two moments
    activations: Activations | None  # of a full pack that is trained whole
    why_unknown: str | None  # why there are none
    flops: float | None


# Bytes a parameter of what each rank holds whole, and of what the ranks share. AdamW has two fp32 moments.
# ddp and fsdp2 train fp32 weights under autocast: 4 + 4 gradient + 8. DeepSpeed trains bf16 weights and gradients with
# fp32 masters: 2 + 2 + 12 (ZeRO, arXiv 1910.02054, section 3); in fp32 it needs no masters.
_STATES = {
    ("ddp", False): (16, 0),
    ("ddp", True): (16, 0),
    ("fsdp2", False): (0, 16),
    ("fsdp2", True): (0, 16),
    ("zero2", False): (4, 12),
    ("zero2", True): (2, 14),
    ("zero3", False): (0, 16),
    ("zero3", True): (0, 16),
}
_COMPUTES_IN_BF16 = ("fsdp2", "zero2", "zero3")  # with weights that are in bf16 then, not copied by autocast
_WITHOUT_AUTOCAST = ("zero2", "zero3")


def estimate(recipe: Recipe, shape: Any, plan: Any | None, *, trained_share: float = 1.0) -> Estimate:
    """shape: the model without weights (model.skeleton). plan: the packs, where there are any.

    trained_share: of the plan's tokens, for the FLOPs. A pack may be trained whole, so the activations are of one that
    is.
    """
    from sft_core.train.activations import UnknownActivations

    training, num_parameters = recipe.training, shape.num_parameters()
    states = num_parameters * bytes_a_parameter(recipe.training, recipe.runtime)
    flops = None
    if plan is not None:
        epoch = float(training_flops(shape).of_documents(plan.num_tokens, trained_share * plan.num_tokens).sum())
        steps = num_steps_of(len(plan), training.global_batch_size, training.num_train_epochs, training.max_steps)
        flops = epoch * steps / math.ceil(len(plan) / training.global_batch_size)
    try:
        activations, why_unknown = _activations(recipe, shape), None
    except UnknownActivations as unknown:
        activations, why_unknown = None, str(unknown)
    return Estimate(num_parameters, states, activations, why_unknown, flops)


def bytes_a_parameter(training: Training, runtime: Runtime) -> float:
    """Of weights, gradients and AdamW's moments on each rank."""
    whole: float
    shared: float
    whole, shared = _STATES[runtime.distributed, training.bf16]
    if training.lora is not None:
        base = 0.55 if training.lora.load_in_4bit else 4  # NF4 with double quantization (QLoRA, arXiv 2305.14314)
        whole, shared = (0, base) if runtime.distributed in ("fsdp2", "zero3") else (base, 0)
    return whole + shared / runtime.num_processes


def _activations(recipe: Recipe, shape: Any) -> Activations:
    """Of a full pack on a GPU, with the attention that it takes there."""
    from sft_core.train.attention import VARLEN, allows_varlen

    attention: str = recipe.model.attn_implementation
    if attention == "auto":
        by_varlen = computes_in_half(recipe) and allows_varlen(shape.config, recipe.model.trust_remote_code)
        attention = VARLEN if by_varlen else "sdpa"
    return activations_of(
        recipe.training,
        recipe.runtime,
        shape,
        tokens=recipe.packing.max_length,
        dtype=recipe.model.dtype,
        attention=attention,
    )


def activations_of(
    training: Training, runtime: Runtime, shape: Any, *, tokens: int, dtype: str, attention: str
) -> Activations:
    """Of a forward of so many tokens on a GPU. dtype: of the weights. Raises UnknownActivations."""
    from sft_core.train.activations import activation_bytes
    from sft_core.train.main import lora_config

    distributed, lora = runtime.distributed, training.lora
    return activation_bytes(
        shape,
        tokens=tokens,
        bf16=training.bf16 and distributed not in _WITHOUT_AUTOCAST,
        dtype="bfloat16" if training.bf16 and distributed in _COMPUTES_IN_BF16 else dtype,
        checkpointing=training.gradient_checkpointing,
        attention=attention,
        liger=liger(training.use_liger_kernel),
        lora=lora_config(lora.model_dump(mode="json"), shape, [], None) if lora is not None else None,
        in_4bit=lora is not None and lora.load_in_4bit,
    )


def estimate_line(needs: Estimate, recipe: Recipe) -> str:
    """The estimate as people read it, in one line."""
    size = functools.partial(naturalsize, binary=True)
    flops = "" if needs.flops is None else f"; {needs.flops:.3g} FLOPs in all"
    begin = (
        f"{needs.num_parameters / 1e6:,.1f} M parameters by {recipe.runtime.distributed} on "
        f"{recipe.runtime.num_processes} rank(s): "
    )
    states = f"{size(needs.states)} for weights, gradients and AdamW"
    if (held := needs.activations) is None:
        return f"{begin}{states} on each; what activations take is not known ({needs.why_unknown}){flops}"
    parts = {
        "the layers": held.layers,
        "16-bit copies of weights": held.weight_copies,
        "the attention's mask": held.mask,
        "the head": held.head,
    }
    named = ", ".join(f"{size(num_bytes)} of {part}" for part, num_bytes in parts.items() if num_bytes)
    return (
        f"{begin}about {size(needs.states + held.total)} on each, {states}, {size(held.total)} for the activations "
        f"of a pack of {recipe.packing.max_length:,} tokens ({named}){flops}"
    )
