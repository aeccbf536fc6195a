"""mSFT (Koh et al. 2026, arXiv 2603.21606): train all tasks, drop the one that over-fits first, roll back, go on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from sft_core.recipe.search.strategies.msft import MsftSettings
from sft_core.recipe.wording import counted
from sft_core.search.peaks import fall_of, first_highest, peak_of
from sft_core.search.rollouts import Best, Curves, Decision, Point, Rollout, Search
from sft_core.search.strategy import Implementation, SearchInput


@dataclasses.dataclass(frozen=True)
class Limits:
    """Caps at which a search ends though it could go on."""

    max_rollouts: int
    max_epochs: float | None = None  # of kept training, over all roll-outs
    max_idle: int | None = None  # roll-outs in a row without a task dropped


@dataclasses.dataclass
class Msft:
    """Exactly what the released code does: the preset `paper`.

    A task's peak is its first highest score; the start of the roll-out counts. The first by name of the tasks that peak
    earliest is dropped; none, when all peak at the last evaluation. Roll-outs always run to their end.
    """

    tasks: Sequence[str]
    epochs_per_rollout: float
    limits: Limits

    def __post_init__(self) -> None:
        self._active = tuple(self.tasks)
        self._round = self._num_idle = 0
        self._start: Point | None = None
        self._epochs = 0.0
        self._best = Best()
        self._at_drop: dict[str, np.ndarray] = {}  # the scores of a dropped task's rows at its drop

    def propose(self) -> Rollout | None:
        if self.ended_by is not None:
            return None
        return Rollout(self._round, self._start, self._active, self.epochs_per_rollout)

    @property
    def best(self) -> Point | None:
        return self._best.point

    @property
    def ended_by(self) -> str | None:
        limits = self.limits
        if not self._active:
            return "every task is dropped"
        if self._round >= limits.max_rollouts:
            return f"max_rollouts: {counted(limits.max_rollouts, 'roll-out')} done"
        if limits.max_epochs is not None and self._epochs >= limits.max_epochs:
            return f"max_epochs: {self._epochs:g} epochs are trained, of {limits.max_epochs:g}"
        if limits.max_idle is not None and self._num_idle >= limits.max_idle:
            return f"max_idle: {counted(self._num_idle, 'roll-out')} in a row dropped no task"
        return None

    def observe(self, curves: Curves) -> Decision:
        rollout = self.propose()
        assert rollout is not None, "the search is over"
        evaluation, dropped, evidence = self._judge(curves)  # before `_best` sees these curves: `_judge` reads it
        self._best.see(rollout.round, curves)
        readmitted = self._forgotten(curves, evaluation)
        self._at_drop |= {task: curves.rows[task][evaluation] for task in dropped}
        self._active = tuple(
            task for task in self.tasks if task in (*self._active, *readmitted) and task not in dropped
        )
        # Evaluation 0 has the weights from which this roll-out started, so rolling back to it changes no weights.
        self._start = Point(rollout.round, evaluation)
        self._epochs += float(curves.epochs[evaluation])
        self._num_idle = 0 if dropped else self._num_idle + 1
        self._round += 1
        return Decision(
            rollout.round,
            tuple(dropped),
            readmitted,
            self._start,
            self._epochs,
            self._reason(dropped, curves, evaluation),
            evidence,
        )

    def wanted(self, curves: Curves) -> set[int]:
        peaks = {first_highest(curves.of(task)) for task in self._active}
        return {*peaks, len(curves.epochs) - 1, *self._best.would_be(curves)}

    def kept(self, curves: Curves) -> set[int]:
        return {self._judge(curves)[0], *self._best.would_be(curves)}

    def is_decided(self, curves: Curves) -> bool:
        return False

    def _judge(self, curves: Curves) -> tuple[int, list[str], dict[str, Mapping[str, float]]]:
        """The evaluation from which the search goes on, the tasks that are dropped there, and the evidence."""
        last = len(curves.epochs) - 1
        peaks = {task: first_highest(curves.of(task)) for task in self._active}
        evidence: dict[str, Mapping[str, float]] = {
            task: {"peak": peak, "score": float(curves.of(task)[peak]), "last": float(curves.of(task)[last])}
            for task, peak in peaks.items()
        }
        earliest = min(peaks.values())
        if earliest == last:
            return last, [], evidence
        return earliest, [min(task for task, peak in peaks.items() if peak == earliest)], evidence

    def _forgotten(self, curves: Curves, evaluation: int) -> tuple[str, ...]:
        return ()

    def _reason(self, dropped: Sequence[str], curves: Curves, evaluation: int) -> str:
        if not dropped:
            return "no task is past its peak: the training goes on from the last evaluation"
        return f"{', '.join(dropped)} peaked first, {curves.epochs[evaluation]:g} epochs into the roll-out"


@dataclasses.dataclass
class RobustMsft(Msft):
    """The same search for noisy scores: the preset `robust`.

    A task is past its peak when a unimodal fit of its scores has turned, and a paired one-sided test says that its rows
    have fallen, at `alpha` over the number of active tasks (Bonferroni). All tasks whose fit turned at the earliest
    peak are dropped together. A roll-out ends once no other task can have an earlier peak. With `readmit`, a dropped
    task comes back when its rows have fallen, by the same test, below their scores at its drop.

    max_kept: at most so many evaluations keep their weights at once. The weights of late peaks go first, for a search
    rolls back to the earliest peak, or to the nearest evaluation with weights.
    """

    alpha: float = 0.05
    readmit: bool = False
    max_kept: int | None = None

    def wanted(self, curves: Curves) -> set[int]:
        peaks = {peak_of(curves.rows[task]).evaluation for task in self._active}
        peaks |= {first_highest(curves.of(task)) for task in self._active}
        always = {len(curves.epochs) - 1, *self._best.would_be(curves)}
        room = None if self.max_kept is None else self.max_kept - len(always)
        return always | {*sorted(peaks - always)[:room]}

    def is_decided(self, curves: Curves) -> bool:
        evaluation, dropped, _ = self._judge(curves)
        others = [task for task in self._active if task not in dropped]
        peaks = [peak_of(curves.rows[task]).evaluation for task in others]
        return bool(dropped) and all(peak > evaluation for peak in peaks)

    def _judge(self, curves: Curves) -> tuple[int, list[str], dict[str, Mapping[str, float]]]:
        peaks = {task: peak_of(curves.rows[task]) for task in self._active}
        level = self.alpha / len(self._active)
        past = {task: peak.evaluation for task, peak in peaks.items() if peak.fall.p < level}
        evidence: dict[str, Mapping[str, float]] = {
            task: {
                "peak": peak.evaluation,
                "score": float(curves.of(task)[peak.evaluation]),
                "last": float(curves.of(task)[-1]),
                **dataclasses.asdict(peak.fall),
                "level": level,
            }
            for task, peak in peaks.items()
        }
        if not past:
            return len(curves.epochs) - 1, [], evidence
        earliest = min(past.values())
        dropped = [task for task, evaluation in past.items() if evaluation == earliest]
        return self._nearest_kept(curves, earliest), dropped, evidence

    def _nearest_kept(self, curves: Curves, evaluation: int) -> int:
        """The nearest evaluation with weights: a fit may turn at an evaluation whose weights are gone."""
        kept: set[int] = set()
        for number in range(len(curves.epochs)):
            kept = (kept | {number}) & self.wanted(curves.until(number))
        return min(kept, key=lambda number: (abs(number - evaluation), number))

    def _forgotten(self, curves: Curves, evaluation: int) -> tuple[str, ...]:
        excluded = [task for task in self.tasks if task not in self._active]
        if not self.readmit or not excluded:
            return ()
        falls = {task: self._at_drop[task] - curves.rows[task][evaluation] for task in excluded}
        level = self.alpha / len(excluded)
        return tuple(task for task, fallen in falls.items() if fall_of(fallen).p < level)


def msft(start: SearchInput) -> Search:
    settings = start.search.settings
    assert isinstance(settings, MsftSettings)
    limits = Limits(settings.max_rollouts, settings.max_epochs, settings.max_idle)
    epochs = start.search.epochs_per_rollout
    if settings.preset == "paper":
        return Msft(start.tasks, epochs, limits)
    return RobustMsft(
        start.tasks,
        epochs,
        limits,
        alpha=settings.alpha,
        readmit=settings.readmit,
        max_kept=settings.max_kept,
    )


IMPLEMENTATIONS = {"msft": Implementation(msft)}
