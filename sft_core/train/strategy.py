"""Tells accelerate in each rank how to share the model, and checks that it does. The strategies: rank_strategies.py.

`accelerate launch --config_file configs/accelerate/NAME.yaml` sets environment variables, from which accelerate and the
Trainer take the strategy in each rank. torchrun starts our ranks, on one node or on several, with the same variables.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from sft_core.recipe.rank_strategies import PLAIN, STRATEGIES

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "accelerate"
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
    """Accelerate uses another strategy than the recipe's."""


def environment(strategy: str) -> dict[str, str]:
    """The variables that `accelerate launch` sets for the strategy's config. Raises KeyError for an unknown setting."""
    config = YAML(typ="safe", pure=True).load(CONFIGS / f"{strategy}.yaml")
    variables: dict[str, str] = {}
    if config["distributed_type"] == "DEEPSPEED":
        variables["ACCELERATE_USE_DEEPSPEED"] = "true"
        for key, value in config["deepspeed_config"].items():
            variables[f"ACCELERATE_DEEPSPEED_{_DEEPSPEED[key]}"] = _text(value)
    if config["distributed_type"] == "FSDP":
        variables["ACCELERATE_USE_FSDP"] = "true"
        for key, value in config["fsdp_config"].items():
            variables[_FSDP.get(key, key.upper())] = _text(value)
    return variables


def prepare_deepspeed() -> None:
    """Sets DeepSpeed to the CPU if torch sees no GPU.

    Switches off its shared-memory collectives: compiling them at the first start takes two minutes.
    """
    import torch

    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def check_engaged(strategy: str, accelerator: Any, wrapped: Any) -> None:
    """Raises WrongStrategy if accelerate uses another strategy, as it does for FSDP on a machine without a GPU.

    wrapped: the model as accelerate wrapped it.
    """
    asked, ranks, engaged = STRATEGIES[strategy], accelerator.num_processes, _engaged(accelerator, wrapped)
    if engaged == asked.engaged_as or (engaged == PLAIN and ranks == 1 and asked.plain_on_one_rank):
        return
    name = next((known.name for known in STRATEGIES.values() if known.engaged_as == engaged), engaged)
    raise WrongStrategy(
        f"runtime.distributed: asked for {strategy} on {ranks} ranks ({accelerator.device.type}), and {name} is "
        f"engaged ({accelerator.distributed_type}); see `accelerate env`"
    )


def _engaged(accelerator: Any, wrapped: Any) -> str:
    """The strategy that accelerate uses, as RankStrategy.engaged_as names it."""
    from torch.distributed.tensor import DTensor

    wrapper = type(wrapped).__name__
    if wrapper == "DeepSpeedEngine":
        return f"{wrapper}, stage {accelerator.state.deepspeed_plugin.zero_stage}"
    if any(isinstance(parameter, DTensor) for parameter in wrapped.parameters()):
        return "DTensor"
    return wrapper if any(wrapper == known.engaged_as for known in STRATEGIES.values()) else PLAIN


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
