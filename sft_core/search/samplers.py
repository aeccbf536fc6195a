"""Samplers that learn while training goes on: what comes next is drawn block by block, from what is measured between.

Pure values again: the same measurements lead to the same blocks.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np

from sft_core.data.packing import PackPlan, first_fit_decreasing

Pack = np.ndarray  # numbers of the plan's documents, int64, shape (documents,)
Block = list[list[Pack]]  # by optimizer step, its global batch


class Sampler(Protocol):
    """Its methods are called in turn: next_block, measure (see probes), learn, next_block, ..."""

    def next_block(self) -> Block | None:
        """The next optimizer steps; None when there is nothing left to train."""

    def probes(self) -> list[Pack] | None:
        """Between two blocks: the packs of which one step's gain is measured. None: the loss of every document is."""

    def learn(self, measured: np.ndarray) -> None:
        """Gains, shape (probes,), or losses per trained token, shape (documents,)."""

    def shares(self) -> dict[str, float]:
        """What the next block is drawn from: of each task, its share of what is trained."""


@dataclasses.dataclass
class Dynamix:
    """DynamixSFT (arXiv 2508.12116): a bandit over tasks whose reward is what one step on a task gains.

    Task k is drawn with p_k = (1 - gamma) softmax_k(beta * Q_k + log p0_k) + gamma / K, where p0 is its share of rows;
    every `every_steps` Q_k = alpha * Q_k + (1 - alpha) * reward_k. Inferred: the reward is the relative fall of the
    loss on one pack of the task by one optimizer step on that pack, taken back; min-max scaled over tasks; beta 5. A
    pack holds rows of one task; its packs come in a random order, each once before any comes again.
    """

    tasks: list[str]
    task: np.ndarray  # of each document, int64, shape (documents,)
    plan: PackPlan
    num_steps: int
    global_batch_size: int
    seed: int
    every_steps: int = 50
    gamma: float = 0.3
    alpha: float = 0.95
    beta: float = 5.0

    def __post_init__(self) -> None:
        first = self.plan.offsets[:-1]
        assert all(len({*self.task[pack].tolist()}) == 1 for pack in map(self._documents, range(len(self.plan))))
        self._packs = [np.flatnonzero(self.task[first] == number) for number in range(len(self.tasks))]
        self._waiting: list[list[int]] = [[] for _ in self.tasks]  # a task's packs that are still to come
        self._rng = np.random.default_rng([self.seed, 0])
        self._values = np.zeros(len(self.tasks))
        self._num_drawn = 0

    def next_block(self) -> Block | None:
        size = min(self.every_steps, self.num_steps - self._num_drawn)
        if size <= 0:
            return None
        self._num_drawn += size
        tasks = self._rng.choice(len(self.tasks), size=(size, self.global_batch_size), p=self._probabilities())
        return [[self._documents(self._next_pack(int(task))) for task in batch] for batch in tasks]

    def probes(self) -> list[Pack]:
        return [self._documents(int(self._rng.choice(packs))) for packs in self._packs]

    def learn(self, measured: np.ndarray) -> None:
        spread = measured.max() - measured.min()
        rewards = (measured - measured.min()) / spread if spread > 0 else np.zeros_like(measured)
        self._values = self.alpha * self._values + (1 - self.alpha) * rewards

    def shares(self) -> dict[str, float]:
        return dict(zip(self.tasks, self._probabilities().tolist(), strict=True))

    def _probabilities(self) -> np.ndarray:
        sizes = np.bincount(self.task, minlength=len(self.tasks))
        logits = self.beta * self._values + np.log(sizes / sizes.sum())
        weights = np.exp(logits - logits.max())
        probabilities = (1 - self.gamma) * weights / weights.sum() + self.gamma / len(self.tasks)
        return probabilities / probabilities.sum()

    def _next_pack(self, task: int) -> int:
        if not self._waiting[task]:
            self._waiting[task] = self._rng.permutation(self._packs[task]).tolist()
        return self._waiting[task].pop()

    def _documents(self, pack: int) -> Pack:
        return np.arange(self.plan.offsets[pack], self.plan.offsets[pack + 1])


@dataclasses.dataclass
class Ies:
    """Instance-dependent early stopping (ICLR 2025): a row is left out of an epoch while its loss hardly bends.

    With the losses L of the last three epochs, it is left out while |L_t - 2 L_(t-1) + L_(t-2)| < delta, and comes back
    when it is not. Its source takes the losses of trained rows as they are trained, and of the others by a forward
    pass; here all are measured at the end of an epoch, by the same weights. The rows that stay are packed anew.
    """

    tasks: list[str]
    task: np.ndarray  # of each document, int64, shape (documents,)
    plan: PackPlan
    num_epochs: float
    global_batch_size: int
    seed: int
    max_length: int | None  # of a pack; None: each row is one
    delta: float = 1e-3

    def __post_init__(self) -> None:
        self._epoch = 0
        self._losses: list[np.ndarray] = []

    def next_block(self) -> Block | None:
        active = np.flatnonzero(self._is_active())
        share = min(1.0, self.num_epochs - self._epoch)
        if share <= 0 or len(active) == 0:
            return None
        packs = self._packs_of(active)
        order = np.random.default_rng([self.seed, self._epoch]).permutation(len(packs))
        size = self.global_batch_size
        batches = [[packs[pack] for pack in order[first : first + size]] for first in range(0, len(order), size)]
        self._epoch += 1
        return batches[: max(1, round(len(batches) * share))]

    def probes(self) -> None:
        return None

    def learn(self, measured: np.ndarray) -> None:
        self._losses = [*self._losses[-2:], measured]

    def shares(self) -> dict[str, float]:
        active, sizes = (
            np.bincount(self.task[which], minlength=len(self.tasks)) for which in (self._is_active(), slice(None))
        )
        return dict(zip(self.tasks, (active / sizes).tolist(), strict=True))

    def _is_active(self) -> np.ndarray:
        if len(self._losses) < 3:
            return np.ones(len(self.task), dtype=bool)
        before, middle, last = self._losses
        return np.abs(last - 2 * middle + before) >= self.delta

    def _packs_of(self, active: np.ndarray) -> list[Pack]:
        if len(active) == len(self.task):
            return np.split(np.arange(len(self.task)), self.plan.offsets[1:-1])
        if self.max_length is None:
            return np.split(active, len(active))
        pack = first_fit_decreasing(self.plan.num_tokens[active], self.max_length)
        order = np.argsort(pack, kind="stable")
        return np.split(active[order], np.flatnonzero(np.diff(pack[order])) + 1)


def make_sampler(
    settings: dict[str, Any],
    *,
    tasks: list[str],
    task: np.ndarray,
    plan: PackPlan,
    num_steps: int,
    num_epochs: float,
    global_batch_size: int,
    max_length: int | None,
    seed: int,
) -> Sampler | None:
    """The sampler of a recipe's search; None for strategies whose roll-outs have a fixed schedule."""
    own: dict[str, Any] = settings.get(settings["strategy"]) or {}
    match settings["strategy"]:
        case "dynamix":
            return Dynamix(tasks, task, plan, num_steps, global_batch_size, seed, **own)
        case "ies":
            return Ies(tasks, task, plan, num_epochs, global_batch_size, seed, max_length, **own)
    return None
