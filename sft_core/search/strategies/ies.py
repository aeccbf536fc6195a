"""Instance-dependent early stopping (ICLR 2025): one roll-out that leaves rows out while their loss hardly bends."""

from __future__ import annotations

import dataclasses

import numpy as np

from sft_core.data.packing.plan import PackPlan, first_fit_decreasing
from sft_core.recipe.search.strategies.ies import IesSettings
from sft_core.search.strategies.baselines import sft
from sft_core.search.strategy import Implementation, SamplerInput
from sft_core.train.hooks import Block, Pack


@dataclasses.dataclass
class Ies:
    """Leaves a row out of an epoch while |L_t - 2 L_(t-1) + L_(t-2)| < delta, by its losses L in the last three epochs.

    The paper takes the losses of trained rows from their training step, and of the others from a forward pass. Here one
    set of weights measures all rows at the end of an epoch. The remaining rows are packed anew.
    """

    tasks: list[str]
    task: np.ndarray  # of each document, int64, shape (documents,)
    plan: PackPlan
    num_epochs: float
    global_batch_size: int
    seed: int
    max_length: int | None  # of a pack; None: each row is a pack
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
            np.bincount(self.task[rows], minlength=len(self.tasks)) for rows in (self._is_active(), slice(None))
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


def sampler(start: SamplerInput) -> Ies:
    settings = start.search.settings
    assert isinstance(settings, IesSettings)
    return Ies(
        start.tasks,
        start.task,
        start.plan,
        start.num_epochs,
        start.global_batch_size,
        start.seed,
        start.max_length,
        delta=settings.delta,
    )


IMPLEMENTATIONS = {"ies": Implementation(sft, sampler)}
