"""DynamixSFT (arXiv 2508.12116): one roll-out whose tasks are drawn by what an optimizer step on each of them gains."""

from __future__ import annotations

import dataclasses

import numpy as np

from sft_core.data.packing.plan import PackPlan
from sft_core.recipe.search.strategies.dynamix import DynamixSettings
from sft_core.search.strategies.baselines import sft
from sft_core.search.strategy import Implementation, SamplerInput
from sft_core.train.hooks import Block, Pack


@dataclasses.dataclass
class Dynamix:
    """A bandit over tasks. Its reward is the gain of an optimizer step on a task.

    Task k is drawn with p_k = (1 - gamma) softmax_k(beta * Q_k + log p0_k) + gamma / K, where p0 is its share of rows;
    every `every_steps` Q_k = alpha * Q_k + (1 - alpha) * reward_k. Inferred: the reward is the relative fall of the
    loss on one pack of the task by one optimizer step on that pack, which is undone; min-max scaled over tasks; beta 5.
    A pack holds rows of one task. A task's packs come in a random order, each once before any comes again.
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


def sampler(start: SamplerInput) -> Dynamix:
    settings = start.search.settings
    assert isinstance(settings, DynamixSettings)
    return Dynamix(
        start.tasks,
        start.task,
        start.plan,
        start.num_steps,
        start.global_batch_size,
        start.seed,
        every_steps=settings.every_steps,
        gamma=settings.gamma,
        alpha=settings.alpha,
        beta=settings.beta,
    )


IMPLEMENTATIONS = {"dynamix": Implementation(sft, sampler)}
