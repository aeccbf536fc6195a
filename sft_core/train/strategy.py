"""How ranks share a model: ddp, fsdp2, zero2, zero3, each an accelerate config; and that it is what was asked for.

`accelerate launch --config_file configs/accelerate/zero3.yaml` sets environment variables, from which accelerate and
the Trainer take the strategy in each rank. torchrun starts our ranks, on one node or on several, with the same ones.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "accelerate"
STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")
SHARED = ("fsdp2", "zero3")  # a rank holds but a share of the parameters
# Names that accelerate's launcher does not derive from its keys (accelerate 1.15, utils/launch.py).
_DEEPSPEED = {
    "zero_stage": "ZERO_STAGE",
    "offload_optimizer_device": "OFFLOAD_OPTIMIZER_DEVICE",
    "offload_param_device": "OFFLOAD_PARAM_DEVICE",
    "zero3_init_flag": "ZERO3_INIT",
    "zero3_save_16bit_model": "ZERO3_SAVE_16BIT_MODEL",
}
_FSDP = {"fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP"}


class WrongStrategy(RuntimeError):
    """Another strategy is engaged than the recipe asks for."""


def environment(strategy: str) -> dict[str, str]:
    """What `accelerate launch` sets for the strategy's config. Raises KeyError for a setting that it does not know."""
    config = YAML(typ="safe", pure=True).load(CONFIGS / f"{strategy}.yaml")
    found: dict[str, str] = {}
    if config["distributed_type"] == "DEEPSPEED":
        found["ACCELERATE_USE_DEEPSPEED"] = "true"
        for key, value in config["deepspeed_config"].items():
            found[f"ACCELERATE_DEEPSPEED_{_DEEPSPEED[key]}"] = _text(value)
    if config["distributed_type"] == "FSDP":
        found["ACCELERATE_USE_FSDP"] = "true"
        for key, value in config["fsdp_config"].items():
            found[_FSDP.get(key, key.upper())] = _text(value)
    return found


def prepare_deepspeed() -> None:
    """Where torch sees no GPU: DeepSpeed on the CPU, without the shared-memory collectives, which it would compile for
    two minutes at the first start."""
    import torch

    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def check_engaged(strategy: str, accelerator: Any, wrapped: Any) -> None:
    """Raises WrongStrategy when accelerate took another one, as it does for FSDP where there is no accelerator.

    wrapped: the model as it is trained.
    """
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    ranks = accelerator.num_processes
    stage = getattr(accelerator.state.deepspeed_plugin, "zero_stage", None)
    found = "a plain model"
    if type(wrapped).__name__ == "DeepSpeedEngine":
        found = f"zero{stage}"
    elif any(isinstance(parameter, DTensor) for parameter in wrapped.parameters()):
        found = "fsdp2"
    elif isinstance(wrapped, DistributedDataParallel):
        found = "ddp"
    if found != strategy and not (strategy == "ddp" and ranks == 1 and found == "a plain model"):
        raise WrongStrategy(
            f"runtime.distributed: asked for {strategy} on {ranks} ranks ({accelerator.device.type}), and {found} is "
            f"engaged ({accelerator.distributed_type}); see `accelerate env`"
        )


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
