"""How an imported recipe shares its model over ranks, by its own keys or its accelerate config."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sft_core.recipe.rank_strategies import STRATEGIES, RankStrategy
from sft_core.recipe.wording import alternatives
from steps.importer.account import Imported, number, short, switch

_OURS = "runtime.distributed"
_BY_STAGE = {
    **{stage: strategy for strategy in STRATEGIES.values() for stage in strategy.zero_stages},
    **{strategy.zero_stages[-1]: strategy for strategy in STRATEGIES.values() if strategy.zero_stages},
}
_BY_TYPE = {kind: strategy for strategy in STRATEGIES.values() for kind in strategy.accelerate_types}
_OF_DEEPSPEED = alternatives(name for name, strategy in STRATEGIES.items() if any(strategy.zero_stages))
SETTINGS = "a strategy's settings are those of configs/accelerate (runtime.distributed)"


def read_strategy(imported: Imported, accelerate: dict[str, Any]) -> None:
    """Takes the keys deepspeed and fsdp, and accounts for every key of the accelerate config under its name."""
    keys = imported.unread
    if "deepspeed" in keys:
        _put(imported, "deepspeed", *_from_deepspeed(keys.pop("deepspeed")))
    if "fsdp" in keys:
        _put(imported, "fsdp", *_from_fsdp(keys.pop("fsdp")))
    for key, value in accelerate.items():
        name = f"accelerate config: {key}"
        if key == "distributed_type":
            _put(imported, name, *_from_type(str(value).upper(), accelerate))
        elif key == "num_processes":
            imported.changed[name] = ("training.global_batch_size", "unless --num-processes is given")
        elif key == "deepspeed_config" and _offloads(value):
            imported.not_carried[name] = "it offloads, which runtime.distributed does not"
        else:
            imported.not_carried[name] = SETTINGS


def _put(imported: Imported, key: str, strategy: RankStrategy | None, reason: str) -> None:
    """Keeps the first strategy that a key gives. strategy: None for a key that means none of ours."""
    if strategy is None:
        imported.not_carried[key] = reason
    elif (other := imported.get(_OURS)) not in (None, strategy.name):
        imported.not_carried[key] = f"{_OURS} is {other} by another key"
    else:
        imported.change(key, _OURS, strategy.name, reason)


# Each returns (strategy, reason), or (None, reason) for a value that means none of ours.


def _from_type(kind: str, accelerate: dict[str, Any]) -> tuple[RankStrategy | None, str]:
    if kind == "DEEPSPEED":
        settings = accelerate.get("deepspeed_config")
        settings = settings if isinstance(settings, dict) else {}
        if "zero_stage" in settings:
            return _from_stage(number(settings["zero_stage"]), "its zero_stage")
        return _from_deepspeed(settings.get("deepspeed_config_file"))
    if (strategy := _BY_TYPE.get(kind)) is None:
        return None, f"found {short(kind)}; {_OURS} is {alternatives(STRATEGIES)}"
    return strategy, f"{strategy.name}: {strategy.summary}, as configs/accelerate/{strategy.name}.yaml has it"


def _from_deepspeed(value: Any) -> tuple[RankStrategy | None, str]:
    """value: DeepSpeed's settings, or the path of their file. Without the file, its name decides."""
    if isinstance(value, str) and Path(value).is_file():
        try:
            value = json.loads(Path(value).read_text(encoding="utf-8"))
        except ValueError:
            return None, f"{value} is no JSON; set {_OURS}: {_OF_DEEPSPEED}"
    if isinstance(value, dict):
        zero = value.get("zero_optimization")
        zero = zero if isinstance(zero, dict) else {}
        strategy, reason = _from_stage(number(zero.get("stage", 0)), "its stage")
        offloads = any(name.startswith("offload") for name in zero)
        return strategy, reason + ("; it offloads, which is not carried" if offloads else "")
    stages = set(re.findall(r"(?:zero|z|stage)[-_]?([0-3])(?![0-9])", str(value).lower()))
    if len(stages) == 1:
        return _from_stage(int(stages.pop()), f"by the name of {value}, which is not here")
    return None, f"found {short(value)}, which is not here to be read; set {_OURS}: {_OF_DEEPSPEED}"


def _from_stage(stage: float | None, source: str) -> tuple[RankStrategy | None, str]:
    if stage not in _BY_STAGE:
        return None, f"found stage {short(stage)} ({source}); ZeRO's stages are 0 to 3"
    strategy = _BY_STAGE[int(stage)]
    more = ", which shares the gradients too" if stage != strategy.zero_stages[-1] else ""
    return strategy, f"{strategy.name}{more}: ZeRO stage {int(stage)}, {source}"


def _from_fsdp(value: Any) -> tuple[RankStrategy | None, str]:
    asked = " ".join(map(str, value)) if isinstance(value, list) else value
    if not asked or not switch(asked):
        return None, "it is off"
    strategy = _BY_TYPE["FSDP"]
    offload = "; it offloads, which is not carried" if "offload" in str(asked) else ""
    return strategy, f"{strategy.name}: {strategy.summary}, all of it over all ranks{offload}"


def _offloads(settings: Any) -> bool:
    names = ("offload_optimizer_device", "offload_param_device")
    return isinstance(settings, dict) and any(settings.get(name) not in (None, "none") for name in names)
