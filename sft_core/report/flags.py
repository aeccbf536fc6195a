"""What a reader of a score must not overlook, in words. Sees plain numbers only."""

from __future__ import annotations

from typing import Any

MAX_CUT_OFF = 0.05  # of the answers: more of them cut off say more of the limit than of the model
LOWER_IS_BETTER = ("loss", "perplexity")
# Of the harness's metrics those of which it is known; of another nobody says what is worse.
HIGHER_IS_BETTER = ("acc", "acc_norm", "acc_mutual_info", "exact_match", "f1", "mcc")


def red_flags(score: dict[str, Any], models: list[str], answers: dict[str, dict[str, Any]] | None = None) -> list[str]:
    """score: a row of the score table. models: whose scores it has, the start model first and the released one last.
    answers: each model's counts, where the score is that of answers."""
    first, last = models[0], models[-1]
    flags = [f"{model} is exactly 0" for model in reversed(models) if score[model] == 0]
    if is_worse(score):
        flags.append(f"worse than {first}")
    if answers is None:
        return flags
    released = answers[last]
    if released["empty"]:
        flags.append(f"{released['empty']} of {released['answers']} answers empty")
    if cut_off(released) > MAX_CUT_OFF:
        flags.append(f"{cut_off(released):.0%} cut off")
    if cut_off(answers[first]) > MAX_CUT_OFF:
        flags.append(f"answers of {first} cut off")  # its score may be the limit's doing, and with it the difference
    return flags


def cut_off(answers: dict[str, Any]) -> float:
    """The share of answers that ended at the limit of new tokens."""
    return answers["cut_off"] / answers["answers"] if answers["answers"] else 0.0


def is_worse(score: dict[str, Any]) -> bool:
    """Whether the whole interval of the difference is on the wrong side of 0."""
    name = score["metric"].split(" ")[-1].partition(",")[0]
    of_harness = ":" in score["task"]  # as in lm_eval:gsm8k; no source's name has one
    if score["low"] is None or (of_harness and name not in HIGHER_IS_BETTER):
        return False
    return bool(score["low"] > 0 if score["metric"] in LOWER_IS_BETTER else score["high"] < 0)
