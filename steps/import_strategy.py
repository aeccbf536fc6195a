"""How ranks shared the model of an imported recipe: what it, or its accelerate config, says of DeepSpeed and FSDP."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from steps.import_account import Imported, number, short, switch

_OURS = "runtime.distributed"
_BY_STAGE = {0: "ddp", 1: "zero2", 2: "zero2", 3: "zero3"}
_PLAIN = ("NO", "MULTI_GPU", "MULTI_CPU")
SETTINGS = "a strategy's settings are those of configs/accelerate (runtime.distributed)"


def read_strategy(found: Imported, left: dict[str, Any], accelerate: dict[str, Any]) -> None:
    """Takes deepspeed and fsdp out of `left`; the keys of accelerate's config are accounted for by its name."""
    if "deepspeed" in left:
        _put(found, "deepspeed", *_deepspeed(left.pop("deepspeed")))
    if "fsdp" in left:
        _put(found, "fsdp", *_fsdp(left.pop("fsdp")))
    for key, value in accelerate.items():
        name = f"accelerate config: {key}"
        if key == "distributed_type":
            _put(found, name, *_distributed_type(str(value).upper(), accelerate))
        elif key == "num_processes":
            found.changed[name] = ("training.global_batch_size", "unless --num-processes is given")
        elif key == "deepspeed_config" and _offloads(value):
            found.not_carried[name] = "it offloads, which runtime.distributed does not"
        else:
            found.not_carried[name] = SETTINGS


def _put(found: Imported, key: str, strategy: str | None, told: str) -> None:
    """One strategy: the first that is told. None: there is none of ours for it."""
    if strategy is None:
        found.not_carried[key] = told
    elif (other := found.get(_OURS)) not in (None, strategy):
        found.not_carried[key] = f"{_OURS} is {other} by another key"
    else:
        found.change(key, _OURS, strategy, told)


def _distributed_type(kind: str, accelerate: dict[str, Any]) -> tuple[str | None, str]:
    if kind == "DEEPSPEED":
        settings = accelerate.get("deepspeed_config")
        settings = settings if isinstance(settings, dict) else {}
        if "zero_stage" in settings:
            return _by_stage(number(settings["zero_stage"]), "its zero_stage")
        return _deepspeed(settings.get("deepspeed_config_file"))
    if kind == "FSDP":
        return "fsdp2", "fsdp2: torch's fully_shard, as configs/accelerate/fsdp2.yaml has it"
    if kind in _PLAIN:
        return "ddp", "ddp: every rank holds the model"
    return None, f"found {short(kind)}; {_OURS} is ddp, fsdp2, zero2 or zero3"


def _deepspeed(value: Any) -> tuple[str | None, str]:
    """value: DeepSpeed's settings, or the path of a file of them, which need not be here."""
    if isinstance(value, str) and Path(value).is_file():
        try:
            value = json.loads(Path(value).read_text(encoding="utf-8"))
        except ValueError:
            return None, f"{value} is no JSON; set {_OURS}: zero2 or zero3"
    if isinstance(value, dict):
        zero = value.get("zero_optimization")
        zero = zero if isinstance(zero, dict) else {}
        strategy, told = _by_stage(number(zero.get("stage", 0)), "its stage")
        offloads = any(name.startswith("offload") for name in zero)
        return strategy, told + ("; it offloads, which is not carried" if offloads else "")
    stages = set(re.findall(r"(?:zero|z|stage)[-_]?([0-3])(?![0-9])", str(value).lower()))
    if len(stages) == 1:
        return _by_stage(int(stages.pop()), f"by the name of {value}, which is not here")
    return None, f"found {short(value)}, which is not here to be read; set {_OURS}: zero2 or zero3"


def _by_stage(stage: float | None, source: str) -> tuple[str | None, str]:
    if stage not in _BY_STAGE:
        return None, f"found stage {short(stage)} ({source}); ZeRO's stages are 0 to 3"
    strategy = _BY_STAGE[int(stage)]
    more = ", which shares the gradients too" if stage == 1 else ""
    return strategy, f"{strategy}{more}: ZeRO stage {int(stage)}, {source}"


def _fsdp(value: Any) -> tuple[str | None, str]:
    asked = " ".join(map(str, value)) if isinstance(value, list) else value
    if not asked or not switch(asked):
        return None, "it is off"
    offload = "; it offloads, which is not carried" if "offload" in str(asked) else ""
    return "fsdp2", f"fsdp2: torch's fully_shard, all of it over all ranks{offload}"


def _offloads(settings: Any) -> bool:
    names = ("offload_optimizer_device", "offload_param_device")
    return isinstance(settings, dict) and any(settings.get(name) not in (None, "none") for name in names)
