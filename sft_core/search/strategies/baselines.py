"""The baselines of mSFT, each as a search: SFT, Continual SFT, SRO SFT and Soft SRO."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from sft_core.recipe.wording import counted
from sft_core.search.peaks import first_highest
from sft_core.search.rollouts import Best, Curves, Decision, Point, Rollout, Search
from sft_core.search.strategy import Implementation, SearchInput


@dataclasses.dataclass
class _Planned:
    """A search with a list of roll-outs, to which observations may add. Delivers the best pooled evaluation."""

    tasks: Sequence[str]
    epochs_per_rollout: float

    def __post_init__(self) -> None:
        self._round, self._epochs, self._best = 0, 0.0, Best()
        self._planned = self._first()

    def _first(self) -> list[Rollout]:
        return [Rollout(0, None, tuple(self.tasks), self.epochs_per_rollout)]

    def propose(self) -> Rollout | None:
        return self._planned[self._round] if self._round < len(self._planned) else None

    @property
    def best(self) -> Point | None:
        return self._best.point

    @property
    def ended_by(self) -> str | None:
        return None if self.propose() is not None else f"{counted(len(self._planned), 'roll-out')} done, as planned"

    def observe(self, curves: Curves) -> Decision:
        rollout = self.propose()
        assert rollout is not None, "the search is over"
        self._best.see(rollout.round, curves)
        evaluation = self._go_on_from(curves)
        self._round += 1
        self._plan(rollout, curves, Point(rollout.round, evaluation))
        self._epochs += float(curves.epochs[evaluation])
        following = self.propose()
        next_active = following.active if following is not None else rollout.active
        dropped = tuple(task for task in rollout.active if task not in next_active)
        evidence: dict[str, Mapping[str, float]] = {
            task: {"peak": first_highest(curves.of(task)), "last": float(curves.of(task)[-1])} for task in self.tasks
        }
        start = Point(rollout.round, evaluation)
        return Decision(rollout.round, dropped, (), start, self._epochs, self._reason(), evidence)

    def wanted(self, curves: Curves) -> set[int]:
        return {len(curves.epochs) - 1, self._go_on_from(curves), *self._best.would_be(curves)}

    def kept(self, curves: Curves) -> set[int]:
        return {self._go_on_from(curves), *self._best.would_be(curves)}

    def is_decided(self, curves: Curves) -> bool:
        return False

    def _go_on_from(self, curves: Curves) -> int:
        return len(curves.epochs) - 1

    def _plan(self, done: Rollout, curves: Curves, point: Point) -> None:
        """Adds the roll-outs that follow from a finished one to the plan."""

    def _reason(self) -> str:
        following = self.propose()
        return "the last roll-out" if following is None else f"next: {', '.join(following.active)}"


class Sft(_Planned):
    """One roll-out over the whole mixture."""


class Continual(_Planned):
    """One task after another, each from the evaluation at which the task before it scored highest."""

    def _first(self) -> list[Rollout]:
        return [Rollout(0, None, (self.tasks[0],), self.epochs_per_rollout)]

    def _go_on_from(self, curves: Curves) -> int:
        return first_highest(curves.of(self.tasks[self._round]))

    def _plan(self, done: Rollout, curves: Curves, point: Point) -> None:
        if self._round < len(self.tasks):
            self._planned.append(Rollout(self._round, point, (self.tasks[self._round],), self.epochs_per_rollout))


class Sro(_Planned):
    """Single roll-out: a first roll-out over all tasks shows each task's peak. A second training from the start drops
    each task at its peak.

    The remaining tasks between two drops are a roll-out. A task that peaks at the start is not trained.
    """

    def _plan(self, done: Rollout, curves: Curves, point: Point) -> None:
        if done.round > 0:
            if self._round < len(self._planned):
                self._planned[self._round] = dataclasses.replace(self._planned[self._round], start=point)
            return
        peaks = {task: float(curves.epochs[first_highest(curves.of(task))]) for task in self.tasks}
        departures = sorted({0.0, *peaks.values()})
        for before, until in itertools.pairwise(departures):
            active = tuple(task for task in self.tasks if peaks[task] > before)
            self._planned.append(Rollout(len(self._planned), None, active, until - before))


@dataclasses.dataclass
class SoftSro(_Planned):
    """As SRO, but the second training drops no task: it draws a task's rows in proportion to rows times peak.

    The proportion is inferred; the source does not give it. sizes: training rows of each task.
    """

    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def _plan(self, done: Rollout, curves: Curves, point: Point) -> None:
        if done.round > 0:
            return
        amounts = {task: self.sizes[task] * float(curves.epochs[first_highest(curves.of(task))]) for task in self.tasks}
        total = sum(amounts.values())
        if total == 0:
            return  # no task has gained: the start model is the best
        # An epoch has as many rows as the mixture.
        scale = sum(self.sizes.values()) / total
        rows = {task: max(1, round(amount * scale)) for task, amount in amounts.items() if amount}
        self._planned.append(Rollout(1, None, tuple(rows), self.epochs_per_rollout, rows))


def sft(start: SearchInput) -> Search:
    return Sft(start.tasks, start.search.epochs_per_rollout)


def continual(start: SearchInput) -> Search:
    return Continual(start.tasks, start.search.epochs_per_rollout)


def sro(start: SearchInput) -> Search:
    return Sro(start.tasks, start.search.epochs_per_rollout)


def soft_sro(start: SearchInput) -> Search:
    return SoftSro(start.tasks, start.search.epochs_per_rollout, start.sizes)


IMPLEMENTATIONS = {
    "sft": Implementation(sft),
    "continual": Implementation(continual),
    "sro": Implementation(sro),
    "soft_sro": Implementation(soft_sro),
}
