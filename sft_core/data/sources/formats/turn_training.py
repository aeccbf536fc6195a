"""What a row says about training on each assistant turn, in the keys of several tools."""

from __future__ import annotations

import sys
from typing import Any, TypedDict

from sft_core.data.sources.rejects import Rejected

_FLAGS = ("train", "training")  # ours and axolotl's


class TrainingChoice(TypedDict, total=False):
    """At most one of the keys. Empty: the turn counts in full."""

    train: bool  # False: the turn is only read
    weight: float  # multiplies the turn's loss


def training_choice(raw: dict[str, Any], role: str, where: str) -> TrainingChoice:
    """{} for a turn that counts in full, {"train": False} for one that is only read, or {"weight": w}.

    `weight` (OpenAI's fine-tuning knows 0 and 1) multiplies the turn's loss; a weight of 0 is no training.
    Raises Rejected (invalid_train) for a value that is no choice, for two that contradict each other, and for
    training on what the model does not write.
    """
    if raw.get("train_detail"):
        raise Rejected("invalid_train", f"{where}.train_detail: parts of a turn cannot be chosen; split the turn")
    flags = {key: raw[key] for key in _FLAGS if raw.get(key) is not None}
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise Rejected("invalid_train", f"{where}.{key}: found {value!r}; it is true or false")
    weight = raw.get("weight")
    if weight is not None and (
        isinstance(weight, bool)
        or not isinstance(weight, (int, float))
        or not 0 <= weight <= sys.float_info.max  # false for NaN too
    ):
        raise Rejected("invalid_train", f"{where}.weight: found {weight!r}; it is a finite number of at least 0")
    wanted = {*flags.values(), *([weight > 0] if weight is not None else [])}
    if role != "assistant":
        if True in wanted:
            raise Rejected("invalid_train", f"{where} is a {role} turn; only what the assistant writes is trained")
        return {}
    # A weight above 0 beside `train: false` is no contradiction: it says what the turn would count.
    if len({*flags.values()}) > 1 or (True in flags.values() and weight == 0):
        raise Rejected("invalid_train", f"{where}: its train, training and weight contradict each other")
    if False in wanted:
        return {"train": False}
    return {"weight": float(weight)} if weight is not None and weight != 1 else {}
