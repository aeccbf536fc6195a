"""What a metric is, and what it asks of a row: the facts about a metric stand in its class and nowhere else.

Invariant: what a row wants is read, or refused, before an answer is generated; an output that cannot be read scores 0.
Outputs come without their thinking.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

if TYPE_CHECKING:
    from sft_core.recipe.evaluation import Evaluation


@dataclasses.dataclass(frozen=True)
class Question:
    """A row that a metric may ask the model."""

    row_id: str
    answer: str | None  # the row's own, where it has one
    target: str  # the text that the row trains as its last turn, without thinking
    conversation: dict[str, Any] | None = None  # canonical, as JSON; for metrics that ask for it


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a row that is asked wants."""

    shown: str | None  # for readers of the rows
    wanted: Any  # what `score` compares outputs with


class Metric(abc.ABC):
    """How answers are scored. As a context it frees what it holds, such as a process."""

    name: str  # what evaluation.metric_by_task calls it
    is_share: ClassVar[bool]  # the score is a share of right answers: its interval is Wilson's, not the normal one
    library: ClassVar[str | None] = None  # the distribution that scores; its version is part of the key
    asks_for: ClassVar[tuple[Literal["conversation", "schema"], ...]] = ()  # besides the row's answer
    # Why no row of a task can be asked, for the error; None: such a task is no error and has its losses alone.
    nothing_to_ask: ClassVar[str | None] = "none has an answer"
    num_timeouts = 0  # answers that took too long to compare

    @classmethod
    def means(cls, name: str) -> bool:
        """Whether a recipe that writes this name means this metric."""
        return name == cls.name

    @classmethod
    def settings(cls, name: str, evaluation: Evaluation, task: str) -> dict[str, Any]:
        """What scores depend on besides name and library, as JSON: it is part of the key, and `load` is given it.

        Raises ValueError for settings that cannot be read.
        """
        return {}

    @classmethod
    def load(cls, identity: Mapping[str, Any]) -> Self:
        """The metric of an identity, which is JSON: the name, and the settings. Raises ValueError."""
        return cls()

    def ask(self, question: Question) -> Asked | None:
        """What the row wants; None where it is not asked. Raises ValueError for an answer that cannot be read."""
        return None if question.answer is None else Asked(question.answer, self.read(question.answer))

    def read(self, answer: str) -> Any:
        """What `score` compares outputs with. Raises ValueError for an answer that cannot be read."""
        return answer

    @abc.abstractmethod
    def score(self, output: str, wanted: Any) -> float:
        """0 to 1."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return None
