"""The process that scores: it holds one model at a time, for one task after another, and ends with whoever started it.

A task that kills it, as one that the memory is too small for does, fails alone: the next process goes on with the rest.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import sys
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from sft_core.die_with_parent import STARTED_BY, die_with_parent
from sft_core.evaluate.gpus import VISIBLE
from sft_core.evaluate.loading import is_device_sound, keeping_a_model
from sft_core.evaluate.piped_process import PipedProcess, ProcessEnded
from sft_core.pins.pinned import PinnedRecipe
from sft_core.recipe.evaluation import LM_EVAL
from sft_core.store.store import Store
from steps.colour import faults_in_colour
from steps.evaluate import EVALUATED, measure_ahead
from steps.scored import KILLED, scoring_stage

log = logging.getLogger(__name__)


class Scoring(NamedTuple):
    model: str
    task: str


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a scoring: the output's address, or why there is none."""

    scoring: Scoring
    address: str | None = None
    reason: str = ""
    traceback: str = ""


class Order(NamedTuple):
    """What the process is to do next."""

    scoring: Scoring
    is_ahead: bool  # only measure what vLLM's answers want to be measured before them


def outcomes(pinned: PinnedRecipe, scorings: list[Scoring], gpus: list[str]) -> Iterator[Outcome]:
    """Scores in a process of its own, which sees these GPUs alone, model after model; what became of each, as it ends.

    A task that cannot be scored on one model is not tried on another. Raises RuntimeError where no process starts.
    """
    waiting, num_idle = list(scorings), 0
    while waiting:
        num_idle += 1  # processes in a row that ended before they did anything
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
                    told = f"its process ended with exit status {ended.status}; see its log"
                    outcome = Outcome(order.scoring, reason=KILLED if ended.is_killed else told)
                num_idle = 0
                if outcome is not None:
                    waiting = [one for one in waiting if one != order.scoring and not _is_in_vain(one, outcome)]
                    yield outcome
                if not process.is_running:
                    break


def _is_in_vain(scoring: Scoring, outcome: Outcome) -> bool:
    return outcome.address is None and scoring.task == outcome.scoring.task


def orders(pinned: PinnedRecipe, scorings: list[Scoring]) -> list[Order]:
    """Model after model, so that each is loaded once. With vLLM all that the network does comes first: the engine takes
    its place, and is started once then."""
    found: list[Order] = []
    for model in pinned.recipe.models:
        of_model = [one for one in scorings if one.model == model]
        by_engine = [one for one in of_model if _is_by_engine(pinned, one)]
        found += [Order(one, is_ahead=False) for one in of_model if one not in by_engine]
        found += [Order(one, is_ahead=True) for one in by_engine]
        found += [Order(one, is_ahead=False) for one in by_engine]
    return found


def _is_by_engine(pinned: PinnedRecipe, scoring: Scoring) -> bool:
    return pinned.recipe.evaluation.engine == "vllm" and not scoring.task.startswith(LM_EVAL)


class ScoreProcess:
    """The process, as whoever asks it sees it. As a context it ends with it."""

    def __init__(self, pinned: PinnedRecipe, gpus: list[str]):
        environment = {
            **os.environ,
            STARTED_BY: str(os.getpid()),
            "PYTHONPATH": os.pathsep.join(str(Path(path).absolute()) for path in sys.path),  # a metric is found as here
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
        """None for what is only measured. Raises ProcessEnded; `is_at_work` then tells whether it had begun."""
        self.is_at_work = False
        if self._pinned is not None:
            self._process.send(pickle.dumps(self._pinned))
            self._pinned = None
        self._process.send(pickle.dumps(order))
        self._process.receive()  # it begins
        self.is_at_work = True
        return pickle.loads(self._process.receive())

    def __enter__(self) -> ScoreProcess:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._process.__exit__(*raised)


# In the process


def main() -> None:
    end, started_by = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(started_by)
    os.set_inheritable(end, False)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pipe = Connection(end)
    try:
        pinned = pickle.loads(pipe.recv_bytes())
        store = Store(pinned.recipe.runtime.store)
        with keeping_a_model():
            while is_device_sound():
                order = pickle.loads(pipe.recv_bytes())
                pipe.send_bytes(b"")
                pipe.send_bytes(pickle.dumps(_done(store, pinned, order)))
    except EOFError:
        return  # nothing more is asked


def _done(store: Store, pinned: PinnedRecipe, order: Order) -> Outcome | None:
    stage, part = scoring_stage(*order.scoring)
    try:
        with faults_in_colour():
            if order.is_ahead:
                assert stage is EVALUATED, "lm-eval's tasks are transformers'"
                measure_ahead(store, pinned, part)
                return None
            return Outcome(order.scoring, str(store.ensure(stage, pinned, **part)))
    except Exception as error:
        # A task's failure stays its own. As text: the error holds on to what it was working on.
        text = traceback.format_exc()
        log.error("model=%s task=%s status=failed\n%s", *order.scoring, text)
        return Outcome(order.scoring, reason=str(error) or type(error).__name__, traceback=text)


if __name__ == "__main__":
    from steps import score_worker

    score_worker.main()  # not this module's second self: what is sent has the classes of the one that others import
