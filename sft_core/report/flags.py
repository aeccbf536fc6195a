"""What a reader of a score must not overlook, in words. Sees plain numbers only."""

from __future__ import annotations

from typing import Any

MAX_CUT_OFF = 0.05  # of the answers: more of them cut off say more of the limit than of the model
LOWER_IS_BETTER = ("loss", "perplexity")


def red_flags(score: dict[str, Any], answers: dict[str, Any] | None = None) -> list[str]:
    """score: a row of the score table. answers: the tuned model's counts, of the metric that answers are scored by."""
    flags = [f"{model} is exactly 0" for model in ("tuned", "base") if score[model] == 0]
    if is_worse(score):
        flags.append("worse than base")
    if answers and answers["empty"]:
        flags.append(f"{answers['empty']} of {answers['answers']} answers empty")
    if answers and answers["answers"] and answers["cut_off"] / answers["answers"] > MAX_CUT_OFF:
        flags.append(f"{answers['cut_off'] / answers['answers']:.0%} cut off")
    return flags


def is_worse(score: dict[str, Any]) -> bool:
    """Whether the whole interval of the difference is on the wrong side of 0."""
    if score["low"] is None:
        return False
    return bool(score["low"] > 0 if score["metric"] in LOWER_IS_BETTER else score["high"] < 0)
