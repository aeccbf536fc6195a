"""What of a recipe needs a GPU: `auto` takes what is there; a demand that cannot be met is told before any work."""

from __future__ import annotations

import functools
import importlib.util
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sft_core.recipe import Recipe

log = logging.getLogger(__name__)
LONG = 16_384  # tokens of a pack, from which sdpa's mask of all pairs takes 256 MiB and more


@functools.cache
def has_gpu() -> bool:
    """Without importing torch, which takes seconds."""
    return shutil.which("nvidia-smi") is not None or Path("/dev/kfd").exists()


def attention(asked: str) -> str:
    """The attention implementation for `auto`: flash attention on a GPU where its package is, else sdpa."""
    if asked != "auto":
        return asked
    chosen = "flash_attention_2" if _on_cuda() and importlib.util.find_spec("flash_attn") else "sdpa"
    log.info("attn_implementation=%s by auto", chosen)
    return chosen


def liger(asked: bool | str) -> bool:
    """Whether Liger's kernels are used: for `auto` where there is a GPU."""
    if asked != "auto":
        return bool(asked)
    chosen = _on_cuda() and importlib.util.find_spec("liger_kernel") is not None
    log.info("use_liger_kernel=%s by auto", chosen)
    return chosen


def unmet_demands(recipe: Recipe) -> str | None:
    """What this machine, which trains, cannot do."""
    lora = recipe.training.lora
    if has_gpu():
        if lora is not None and lora.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
            return "training.lora.load_in_4bit: true needs bitsandbytes; pip install bitsandbytes"
        return None
    demands = {
        "model.attn_implementation: flash_attention_2": recipe.model.attn_implementation == "flash_attention_2",
        "training.use_liger_kernel: true": recipe.training.use_liger_kernel is True,
        "training.lora.load_in_4bit: true (QLoRA)": lora is not None and lora.load_in_4bit,
        "runtime.distributed: fsdp2": recipe.runtime.distributed == "fsdp2",
        "model.attn_implementation: flex_attention (which has no backward pass on a CPU)": (
            recipe.model.attn_implementation == "flex_attention"
        ),
    }
    asked = [name for name, is_asked in demands.items() if is_asked]
    if not asked:
        return None
    return f"{'; '.join(asked)}: needs a GPU, and this machine has none; to train here set it otherwise"


def check_machine(recipe: Recipe) -> None:
    """Raises ValueError for what this machine, which trains, cannot do."""
    if unmet := unmet_demands(recipe):
        raise ValueError(unmet)


def lost_updates(recipe: Recipe) -> str | None:
    """A warning where weights are in bfloat16 alone: an update under 1/256 of a weight is rounded away."""
    sharded_by_deepspeed = recipe.runtime.distributed in ("zero2", "zero3")  # which keeps fp32 masters by itself
    if recipe.model.dtype != "bfloat16" or recipe.training.lora is not None or sharded_by_deepspeed:
        return None
    return (
        "model.dtype bfloat16 keeps no fp32 master weights: updates under 1/256 of a weight are lost. Set model.dtype: "
        "float32 with training.bf16: true, or runtime.distributed: zero2 or zero3"
    )


def _on_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
