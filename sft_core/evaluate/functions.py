"""A user's function as a metric: called as function(output, answer, row), it gives 0 to 1."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from sft_core.evaluate.scorers import Asked, Metric, Question


class Function(Metric):
    """`package.module:function`. Every row is asked; a row without an answer gives None for it.

    row: the canonical conversation (messages, and where it has them tools, kwargs, answer) and its row_id.
    Raises ValueError for what cannot be imported, or called so.
    """

    wants_conversation = True

    def __init__(self, name: str):
        super().__init__(name)
        module, _, function = name.partition(":")
        try:
            loaded = importlib.import_module(module)
        except Exception as error:
            # Whatever a user's module raises: it is told with the key that names it.
            raise ValueError(f"{module} cannot be imported ({type(error).__name__}: {error})") from error
        self._call: Any = getattr(loaded, function, None)
        if not callable(self._call):
            found = "nothing" if self._call is None else type(self._call).__name__
            raise ValueError(f"found {found} as {function!r} in {module}; a function is wanted")
        try:
            inspect.signature(self._call).bind("output", "answer", {})
        except TypeError as error:
            raise ValueError(f"{name} is called as function(output, answer, row): {error}") from None

    def ask(self, question: Question) -> Asked:
        assert question.conversation is not None, "it is read for metrics that want it"
        row = {**question.conversation, "row_id": question.row_id}
        return Asked(question.answer, (question.answer, row))

    def score(self, output: str, wanted: tuple[str | None, dict[str, Any]]) -> float:
        answer, row = wanted
        value = self._call(output, answer, row)
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValueError(f"{self.name} gave {value!r}; a score is a number of 0 to 1")
        return float(value)
