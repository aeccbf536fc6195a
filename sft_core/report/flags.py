"""Red flags: warnings about a score, in words. Sees plain numbers only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from sft_core.report.rows import ScoreRow

MAX_CUT_OFF = 0.05  # of the answers: a larger share says more of the limit than of the model
LOWER_IS_BETTER = ("loss", "perplexity")
# lm-eval's metrics that are known to be better when higher. Any other metric gets no flag: its direction is unknown.
HIGHER_IS_BETTER = ("acc", "acc_norm", "acc_mutual_info", "exact_match", "f1", "mcc")


@dataclasses.dataclass(frozen=True)
class Answers:
    """Counts of a model's answers to a task: all, the empty ones, and those cut off at the limit of new tokens.

    metric: what scores the answers, None where no row was asked.
    """

    metric: str | None
    num: int
    num_empty: int
    num_cut_off: int

    @property
    def cut_off_share(self) -> float:
        return self.num_cut_off / self.num if self.num else 0.0


def red_flags(row: ScoreRow, answers: Mapping[str, Answers] | None = None) -> list[str]:
    """answers: those of each model, where the row scores answers."""
    first, last = row.models[0], row.models[-1]
    flags = [f"{model} is exactly 0" for model in reversed(row.models) if row.by_model[model] == 0]
    if is_worse(row):
        flags.append(f"worse than {first}")
    if answers is None:
        return flags
    released = answers[last]
    if released.num_empty:
        flags.append(f"{released.num_empty} of {released.num} answers empty")
    if released.cut_off_share > MAX_CUT_OFF:
        flags.append(f"{released.cut_off_share:.0%} cut off")
    if answers[first].cut_off_share > MAX_CUT_OFF:
        flags.append(f"answers of {first} cut off")  # the limit lowers its score, and so raises the difference
    return flags


def is_worse(row: ScoreRow) -> bool:
    """Whether the whole interval of the difference is on the wrong side of 0."""
    name = row.metric.split(" ")[-1].partition(",")[0]
    is_lm_eval = ":" in row.task  # as in lm_eval:gsm8k; no source's name has a colon
    if row.low is None or row.high is None or (is_lm_eval and name not in HIGHER_IS_BETTER):
        return False
    return row.low > 0 if row.metric in LOWER_IS_BETTER else row.high < 0
