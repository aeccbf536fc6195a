"""The metric `exact_match`, by which a task is scored where the recipe names none."""

from __future__ import annotations

from sft_core.evaluate.metrics.metric import Metric


class ExactMatch(Metric):
    """The whole output is the answer, but for white space around it."""

    name = "exact_match"
    is_share = True
    nothing_to_ask = None  # it is every task's default, those without answers included

    def score(self, output: str, wanted: str) -> float:
        return float(output.strip() == wanted.strip())
