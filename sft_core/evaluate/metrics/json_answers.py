"""The metric `json`: whether a whole output is JSON."""

from __future__ import annotations

import json
import re
from typing import Any

from sft_core.evaluate.metrics.metric import Asked, Metric, Question

_FENCED = re.compile(r"\s*```[A-Za-z0-9_-]*[ \t]*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)


def parse_json(text: str) -> Any:
    """The JSON value of a whole text, with or without a code fence. Raises ValueError."""
    fenced = _FENCED.match(text)
    try:
        return json.loads(fenced[1] if fenced else text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


class Json(Metric):
    """Valid JSON. Every row is asked: the metric needs no answer."""

    name = "json"
    is_share = True

    def ask(self, question: Question) -> Asked:
        return Asked(question.answer, None)

    def score(self, output: str, wanted: None) -> float:
        try:
            value = parse_json(output)
        except ValueError:
            return 0.0
        return float(self.accepts(value))

    def accepts(self, value: Any) -> bool:
        return True
