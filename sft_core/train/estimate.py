"""What training will take of a GPU's memory and how much it computes, by formulas, before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from sft_core.train.flops import training_flops
from sft_core.train.schedule import num_steps_of

if TYPE_CHECKING:
    from sft_core.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on each GPU, and FLOPs of the whole training (None: not known before there are packs)."""

    num_parameters: int
    states: float  # weights, gradients, AdamW's two moments
    activations: float
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


def estimate(recipe: Recipe, shape: Any, plan: Any | None, *, trained_share: float = 1.0) -> Estimate:
    """shape: the model without weights (model.skeleton). plan: the packs, where there are any.

    trained_share: of the plan's tokens.
    """
    config, training, ranks = shape.config.get_text_config(), recipe.training, recipe.runtime.num_processes
    num_parameters = shape.num_parameters()
    whole: float
    shared: float
    whole, shared = _STATES[recipe.runtime.distributed, training.bf16]
    if training.lora is not None:
        base = 0.55 if training.lora.load_in_4bit else 4  # NF4 with double quantization (QLoRA, arXiv 2305.14314)
        whole, shared = (0, base) if recipe.runtime.distributed in ("fsdp2", "zero3") else (base, 0)
    states = num_parameters * (whole + shared / ranks)
    flops = None
    if plan is not None:
        epoch = float(training_flops(shape).of_documents(plan.num_tokens, trained_share * plan.num_tokens).sum())
        steps = num_steps_of(len(plan), training.global_batch_size, training.num_train_epochs, training.max_steps)
        flops = epoch * steps / math.ceil(len(plan) / training.global_batch_size)
    return Estimate(num_parameters, states, _activations(config, recipe), flops)


def _activations(config: Any, recipe: Recipe) -> float:
    """Of one pack: 34 bytes a token, layer and hidden unit in 16 bits (Korthikanti et al., arXiv 2205.05198, without
    the attention scores that fused kernels never hold); with checkpointing each layer's input and one layer whole.
    """
    tokens, width = recipe.packing.max_length, config.hidden_size
    layer = 34.0 * tokens * width * (1 if recipe.training.bf16 else 2)
    if recipe.training.gradient_checkpointing:
        kept = tokens * width * (2 if recipe.training.bf16 else 4)
        return config.num_hidden_layers * kept + layer
    return config.num_hidden_layers * layer


def told(found: Estimate, recipe: Recipe) -> str:
    """The estimate in a line."""
    total, states, activations = map(_size, (found.states + found.activations, found.states, found.activations))
    flops = "" if found.flops is None else f"; {found.flops:.3g} FLOPs in all"
    return (
        f"{found.num_parameters / 1e6:,.1f} M parameters by {recipe.runtime.distributed} on "
        f"{recipe.runtime.num_processes} rank(s): about {total} on each, {states} for weights, gradients and AdamW, "
        f"{activations} for the activations of a pack{flops}"
    )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
