"""Scores tasks in a process of its own, which holds one model at a time, and gives the outcome of each.

A task that kills the process, such as one that needs too much memory, fails alone: the next process does the others.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sft_core.die_with_parent import STARTED_BY
from sft_core.evaluate.gpus import VISIBLE
from sft_core.evaluate.piped_process import PipedProcess, ProcessEnded
from sft_core.pins.pinned import PinnedRecipe
from sft_core.recipe.evaluation import LM_EVAL
from steps.scored import KILLED


class Scoring(NamedTuple):
    model: str
    task: str


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a scoring: the output's address, or the reason why there is none."""

    scoring: Scoring
    address: str | None = None
    reason: str = ""
    traceback: str = ""


class Order(NamedTuple):
    """The next thing for the process to do."""

    scoring: Scoring
    is_ahead: bool  # only measure the losses that must precede vLLM's answers


def outcomes(pinned: PinnedRecipe, scorings: list[Scoring], gpus: list[str]) -> Iterator[Outcome]:
    """The outcome of each scoring, as it ends. The process sees these GPUs only, and scores model after model.

    A task that cannot be scored on one model is not tried on another. Raises RuntimeError if no process starts.
    """
    waiting, num_idle = list(scorings), 0
    while waiting:
        num_idle += 1  # processes in a row that ended before their first order
        with ScoreProcess(pinned, gpus) as process:
            for order in orders(pinned, waiting):
                if order.scoring not in waiting:
                    continue
                try:
                    outcome = process.run(order)
                except ProcessEnded as ended:
                    if not process.is_at_work:
                        if num_idle > 1:
                            raise RuntimeError(
                                f"the process that scores ended with exit status {ended.status} before its first "
                                "task, twice; see its error above"
                            ) from None
                        break
                    reason = f"its process ended with exit status {ended.status}; see its log"
                    outcome = Outcome(order.scoring, reason=KILLED if ended.is_killed else reason)
                num_idle = 0
                if outcome is not None:
                    waiting = [each for each in waiting if each != order.scoring and not _is_in_vain(each, outcome)]
                    yield outcome
                if not process.is_running:
                    break


def _is_in_vain(scoring: Scoring, outcome: Outcome) -> bool:
    return outcome.address is None and scoring.task == outcome.scoring.task


def orders(pinned: PinnedRecipe, scorings: list[Scoring]) -> list[Order]:
    """Model after model, so that each is loaded once. With vLLM, all that the network computes comes first: then the
    engine takes the network's memory, and starts only once."""
    ordered: list[Order] = []
    for model in pinned.recipe.models:
        of_model = [scoring for scoring in scorings if scoring.model == model]
        by_engine = [scoring for scoring in of_model if _is_by_engine(pinned, scoring)]
        ordered += [Order(scoring, is_ahead=False) for scoring in of_model if scoring not in by_engine]
        ordered += [Order(scoring, is_ahead=True) for scoring in by_engine]
        ordered += [Order(scoring, is_ahead=False) for scoring in by_engine]
    return ordered


def _is_by_engine(pinned: PinnedRecipe, scoring: Scoring) -> bool:
    return pinned.recipe.evaluation.engine == "vllm" and not scoring.task.startswith(LM_EVAL)


class ScoreProcess:
    """Starts the process (steps/score_worker.py) and gives it orders; as a context manager it ends the process."""

    def __init__(self, pinned: PinnedRecipe, gpus: list[str]):
        environment = {
            **os.environ,
            STARTED_BY: str(os.getpid()),
            # The process must import a metric as we do.
            "PYTHONPATH": os.pathsep.join(str(Path(path).absolute()) for path in sys.path),
            "PYTHONUNBUFFERED": "1",
            **({VISIBLE: ",".join(gpus)} if gpus else {}),
        }
        self._process = PipedProcess([sys.executable, "-P", "-m", "steps.score_worker"], environment)
        self._pinned: PinnedRecipe | None = pinned
        self.is_at_work = False

    @property
    def is_running(self) -> bool:
        return self._process.is_running

    def run(self, order: Order) -> Outcome | None:
        """The outcome; None for an order ahead. Raises ProcessEnded; `is_at_work` then says whether it had begun."""
        self.is_at_work = False
        if self._pinned is not None:
            self._process.send(pickle.dumps(self._pinned))
            self._pinned = None
        self._process.send(pickle.dumps(order))
        self._process.receive()  # the process begins the order
        self.is_at_work = True
        return pickle.loads(self._process.receive())

    def __enter__(self) -> ScoreProcess:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._process.__exit__(*raised)
