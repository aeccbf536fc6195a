"""The parts of a recipe that need a GPU. `auto` uses what is there; an unmet demand is an error before any work."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from sft_core.recipe.rank_strategies import STRATEGIES
from sft_core.recipe.wording import alternatives

if TYPE_CHECKING:
    from sft_core.recipe.recipe import PhaseRecipe

log = logging.getLogger(__name__)
HALF_ONLY = ("varlen", "flash_attention_2")  # attention whose kernels take only half precision


def has_gpu() -> bool:
    """Whether this process may use a GPU, without importing torch, which takes seconds. The ranks ask torch."""
    hidden = any(os.environ.get(name, "all") in ("", "-1") for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"))
    return not hidden and (shutil.which("nvidia-smi") is not None or Path("/dev/kfd").exists())


def liger(asked: bool | str) -> bool:
    """Whether Liger's kernels are used: for `auto` where there is a GPU."""
    if asked != "auto":
        return bool(asked)
    chosen = _on_cuda() and importlib.util.find_spec("liger_kernel") is not None
    log.info("use_liger_kernel=%s by auto", chosen)
    return chosen


def unmet_demands(recipe: PhaseRecipe, *, on_gpu: bool | None = None) -> str | None:
    """The recipe's demands that this machine, which trains, does not meet. on_gpu: it has a GPU; None: ask has_gpu."""
    lora, attention = recipe.training.lora, recipe.model.attn_implementation
    strategy = STRATEGIES[recipe.runtime.distributed]
    if has_gpu() if on_gpu is None else on_gpu:
        if lora is not None and lora.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
            return "training.lora.load_in_4bit: true needs bitsandbytes; pip install bitsandbytes"
        if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            return (
                "model.attn_implementation: flash_attention_2 needs the package flash-attn; pip install flash-attn "
                "--no-build-isolation, or take varlen, which is PyTorch's own and needs nothing"
            )
        if attention in HALF_ONLY and not computes_in_half(recipe):
            return (
                f"model.attn_implementation: {attention} computes only in half precision on a GPU; set training.bf16: "
                "true, or choose another attention"
            )
        return None
    demands = {
        "model.attn_implementation: flash_attention_2": attention == "flash_attention_2",
        "training.use_liger_kernel: true": recipe.training.use_liger_kernel is True,
        "training.lora.load_in_4bit: true (QLoRA)": lora is not None and lora.load_in_4bit,
        f"runtime.distributed: {strategy.name}": strategy.needs_gpu,
        "model.attn_implementation: flex_attention (which has no backward pass on a CPU)": (
            attention == "flex_attention"
        ),
    }
    asked = [name for name, is_asked in demands.items() if is_asked]
    if not asked:
        return None
    return f"{'; '.join(asked)}: needs a GPU, and this machine has none; to train here choose another value"


def check_machine(recipe: PhaseRecipe) -> None:
    """Raises ValueError if this machine, which trains, does not meet the recipe's demands."""
    if unmet := unmet_demands(recipe):
        raise ValueError(unmet)


def unseen_gpu(recipe: PhaseRecipe) -> str | None:
    """On a machine with a GPU: a warning if torch does not see it. Raises ValueError if the recipe demands a GPU."""
    if _on_cuda():
        return None
    import torch

    if unmet := unmet_demands(recipe, on_gpu=False):
        raise ValueError(unmet)
    return (
        f"this machine has a GPU, and torch {torch.__version__} sees none, so everything runs on the CPU; check that "
        "torch is a CUDA build and that the driver is new enough"
    )


def computes_in_half(recipe: PhaseRecipe) -> bool:
    """Whether the model computes in half precision: by autocast, or by its weights."""
    return recipe.training.bf16 or recipe.model.dtype == "bfloat16"


def slow_precision(recipe: PhaseRecipe) -> str | None:
    """A warning where a GPU would compute in fp32."""
    if not has_gpu() or computes_in_half(recipe):
        return None
    return (
        "training.bf16 is false: a GPU multiplies matrices in TF32, at half the speed of bfloat16 and with twice "
        "the memory for activations, and varlen attention is not available. Set training.bf16: "
        "true; weights and optimizer stay fp32"
    )


def lost_updates(recipe: PhaseRecipe) -> str | None:
    """A warning where weights are in bfloat16 alone: an update under 1/256 of a weight is rounded away."""
    has_masters = STRATEGIES[recipe.runtime.distributed].master_weights
    if recipe.model.dtype != "bfloat16" or recipe.training.lora is not None or has_masters:
        return None
    with_masters = alternatives(name for name, strategy in STRATEGIES.items() if strategy.master_weights)
    return (
        "model.dtype bfloat16 keeps no fp32 master weights: updates under 1/256 of a weight are lost. Set model.dtype: "
        f"float32 with training.bf16: true, or runtime.distributed: {with_masters}"
    )


def _on_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
