"""The job of a roll-out's ranks: a training's job, and the search that judges it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import JsonValue, PlainSerializer

from sft_core.recipe.search.section import Search
from sft_core.search.rollouts import Point
from sft_core.train.job import TrainJob, TrainSpec

if TYPE_CHECKING:
    from sft_core.store.stage import Json


def _keys_that_are_set(search: Search) -> dict[str, JsonValue]:
    return search.model_dump(mode="json", exclude_unset=True)  # parsing refuses keys of other strategies


@dataclasses.dataclass(frozen=True)
class RolloutSpec:
    """The recipe's settings of a roll-out besides its training.

    tasks: all tasks of the search; active: those that are trained. sizes: training rows of each task, where the
    strategy needs them. start: the evaluation whose weights it starts from; None: the start model. answers: by task,
    AnswerSettings (sft_core/evaluate/selection_answers.py) as JSON, where answers are scored. max_length: tokens of a
    pack, where the strategy packs rows anew.
    """

    search: Annotated[Search, PlainSerializer(_keys_that_are_set)]
    tasks: list[str]
    sizes: dict[str, int]
    active: list[str]
    start: Point | None
    answers: dict[str, dict[str, Any]] | None
    max_length: int | None

    @property
    def identity(self) -> dict[str, Json]:
        """The settings on which the weights depend, as JSON."""
        optional: dict[str, Json] = {}
        if self.answers is not None:
            optional["answers"] = self.answers
        if self.search.needs.repacks:
            optional["max_length"] = self.max_length
        if self.search.settings.test is not None:
            optional["test"] = self.search.settings.test
        return {
            "search": self.search.identity,
            "tasks": self.tasks,
            "sizes": self.sizes,
            "active": self.active,
            "start": None if self.start is None else self.start._asdict(),
            **optional,
        }


@dataclasses.dataclass(frozen=True)
class SearchSpec:
    """The recipe's settings of one round of a search."""

    train: TrainSpec
    rollout: RolloutSpec


@dataclasses.dataclass(frozen=True)
class RolloutJob:
    """A roll-out on this machine.

    before: the outputs of earlier roll-outs. conversations: their folder, for each task whose metric reads them.
    """

    train: TrainJob
    rollout: RolloutSpec
    before: list[Path]
    conversations: dict[str, Path]
