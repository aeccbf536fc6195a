"""A user's function as a metric: called as function(output, answer, row), it gives 0 to 1."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from sft_core.evaluate.metrics.metric import Asked, Metric, Question
from sft_core.store.code_digest import user_code_digest

if TYPE_CHECKING:
    from pydantic import JsonValue

    from sft_core.recipe.evaluation import Evaluation

_FORM = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


class Function(Metric):
    """`package.module:function`. Every row is asked; for a row without an answer the function gets None.

    row: JSON, the canonical conversation (messages, and where it has them tools, kwargs, answer) and its row_id.
    Raises ValueError for a function that cannot be imported, or cannot be called so.
    """

    name = "package.module:function"
    is_share = False  # its values may lie anywhere from 0 to 1, for which Wilson's interval is far too wide
    asks_for = ("conversation",)

    def __init__(self, name: str):
        self.name = name
        module, _, function = name.partition(":")
        try:
            loaded = importlib.import_module(module)
        except Exception as error:
            # A user's module may raise anything. Callers add the recipe's key that names the module.
            raise ValueError(f"{module} cannot be imported ({type(error).__name__}: {error})") from error
        self._call: Any = getattr(loaded, function, None)
        if not callable(self._call):
            kind = "nothing" if self._call is None else type(self._call).__name__
            raise ValueError(f"found {kind} as {function!r} in {module}; a metric is a function")
        try:
            inspect.signature(self._call).bind("output", "answer", {})
        except TypeError as error:
            raise ValueError(f"{name} is called as function(output, answer, row): {error}") from None

    @classmethod
    def means(cls, name: str) -> bool:
        return _FORM.fullmatch(name) is not None

    @classmethod
    def settings(cls, name: str, evaluation: Evaluation, task: str) -> dict[str, JsonValue]:
        return {"code": user_code_digest(name.partition(":")[0])}

    @classmethod
    def load(cls, identity: Mapping[str, Any]) -> Self:
        return cls(identity["name"])

    def ask(self, question: Question) -> Asked:
        assert question.conversation is not None, "it is read for metrics that ask for it"
        row = {**question.conversation, "row_id": question.row_id}
        return Asked(question.answer, (question.answer, row))

    def score(self, output: str, wanted: tuple[str | None, dict[str, JsonValue]]) -> float:
        answer, row = wanted
        value = self._call(output, answer, row)
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValueError(f"{self.name} gave {value!r}; a score is a number of 0 to 1")
        return float(value)
