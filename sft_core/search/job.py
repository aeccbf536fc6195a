"""The job of a roll-out's ranks: a training's job, and what the search has to know to judge it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from pydantic import PlainSerializer

from sft_core.recipe.search.section import Search
from sft_core.search.rollouts import Point
from sft_core.train.job import TrainJob, TrainSpec


def _keys_that_are_set(search: Search) -> dict[str, Any]:
    return search.model_dump(mode="json", exclude_unset=True)  # read again, an idle key is an error


@dataclasses.dataclass(frozen=True)
class RolloutSpec:
    """What a recipe asks of a roll-out beside its training.

    tasks: all that the search knows; active: those that are trained. sizes: training rows of each task, where the
    strategy needs them. start: the evaluation whose weights it starts from; None: the start model. answers: by task,
    its metric's identity and max_new_tokens, where answers are scored. max_length: of a pack that is packed anew.
    """

    search: Annotated[Search, PlainSerializer(_keys_that_are_set)]
    tasks: list[str]
    sizes: dict[str, int]
    active: list[str]
    start: Point | None
    answers: dict[str, dict[str, Any]] | None
    max_length: int | None

    @property
    def identity(self) -> dict[str, Any]:
        """What of it the weights depend on, as JSON."""
        optional: dict[str, Any] = {}
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
    """What a recipe asks of one round of a search."""

    train: TrainSpec
    rollout: RolloutSpec


@dataclasses.dataclass(frozen=True)
class RolloutJob:
    """A roll-out on this machine. before: the outputs of the roll-outs before it. conversations: by task, the folder of
    those whose metric reads them."""

    train: TrainJob
    rollout: RolloutSpec
    before: list[Path]
    conversations: dict[str, Path]
