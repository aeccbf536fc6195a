"""The metric `reasoning_gym`: each row is scored by the reasoning-gym task that its item comes from."""

from __future__ import annotations

import json
from typing import TypedDict

from sft_core.evaluate.metrics.metric import Asked, Metric, Question

# The scorers of these tasks compare tuples, which JSON turns into lists: a right answer would not score 1.
_WITHOUT_JSON = ("arc_agi", "rearc")


class Metadata(TypedDict):
    source_dataset: str  # the task; an item holds more of its own


class Item(TypedDict):
    """JSON as reasoning-gym writes it."""

    question: str
    answer: str | None
    metadata: Metadata


class ReasoningGym(Metric):
    """The score by reasoning-gym's own scorer; the row's answer is the whole item."""

    name = "reasoning_gym"
    is_share = True
    library = "reasoning-gym"

    def read(self, answer: str) -> Item:
        from reasoning_gym.factory import DATASETS

        try:
            item = json.loads(answer)
            name = item["metadata"]["source_dataset"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"found {answer[:80]!r}; reasoning_gym wants the whole item as the row's answer: "
                '{"question": ..., "answer": ..., "metadata": {"source_dataset": ...}}'
            ) from None
        if name not in DATASETS or name in _WITHOUT_JSON:
            reason = "its items do not survive JSON" if name in DATASETS else "reasoning-gym has no such task"
            raise ValueError(f"metadata.source_dataset: found {name!r}; {reason}")
        return item

    def ask(self, question: Question) -> Asked | None:
        asked = super().ask(question)
        return asked and Asked(str(asked.wanted.get("answer")), asked.wanted)

    def score(self, output: str, wanted: Item) -> float:
        import reasoning_gym

        score = reasoning_gym.get_score_answer_fn(wanted["metadata"]["source_dataset"])
        return float(score(output, wanted))
