"""The metric `exact_match`, the default of every task."""

from __future__ import annotations

from sft_core.evaluate.metrics.metric import Metric


class ExactMatch(Metric):
    """The whole output equals the answer; white space around them does not count."""

    name = "exact_match"
    is_share = True
    nothing_to_ask = None  # the default of tasks without answers, too

    def score(self, output: str, wanted: str) -> float:
        return float(output.strip() == wanted.strip())
