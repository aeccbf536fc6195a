"""The base class of metrics. All facts about a metric stand in its class and nowhere else.

Invariant: a row's answer is read, or refused, before the model generates; an output that cannot be read scores 0.
Outputs come without their thinking.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

if TYPE_CHECKING:
    from pydantic import JsonValue

    from sft_core.recipe.evaluation import Evaluation


@dataclasses.dataclass(frozen=True)
class Question:
    """A row, before the metric decides whether to ask the model for an answer."""

    row_id: str
    answer: str | None  # the row's own, where it has one
    target: str  # the text that the row trains as its last turn, without thinking
    conversation: dict[str, JsonValue] | None = None  # canonical; for metrics that ask for it


@dataclasses.dataclass(frozen=True)
class Asked:
    """The right answer to a row that is asked."""

    shown: str | None  # for readers of the rows
    wanted: Any  # `score` compares outputs with it


class Metric(abc.ABC):
    """How answers are scored. As a context manager it ends its processes."""

    name: str  # in evaluation.metric_by_task
    is_share: ClassVar[bool]  # the score is a share of right answers: its interval is Wilson's, not the normal one
    library: ClassVar[str | None] = None  # the distribution that scores; its version is part of the key
    asks_for: ClassVar[tuple[Literal["conversation", "schema"], ...]] = ()  # besides the row's answer
    # The error's reason where no row of a task can be asked; None: such a task is no error, and has losses alone.
    nothing_to_ask: ClassVar[str | None] = "none has an answer"
    num_timeouts = 0  # answers that took too long to compare

    @classmethod
    def means(cls, name: str) -> bool:
        """Whether a recipe that writes this name means this metric."""
        return name == cls.name

    @classmethod
    def settings(cls, name: str, evaluation: Evaluation, task: str) -> dict[str, JsonValue]:
        """The settings on which scores depend besides name and library. They are part of the key, and `load` gets them.

        Raises ValueError for settings that cannot be read.
        """
        return {}

    @classmethod
    def load(cls, identity: Mapping[str, Any]) -> Self:
        """The metric of an identity, which is JSON: the name and the settings. Raises ValueError."""
        return cls()

    def ask(self, question: Question) -> Asked | None:
        """The row's right answer; None for a row that is not asked. Raises ValueError for an unreadable answer."""
        return None if question.answer is None else Asked(question.answer, self.read(question.answer))

    def read(self, answer: str) -> Any:
        """The value that `score` compares outputs with. Raises ValueError for an unreadable answer."""
        return answer

    @abc.abstractmethod
    def score(self, output: str, wanted: Any) -> float:
        """0 to 1."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return None
