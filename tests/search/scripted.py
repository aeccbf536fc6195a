"""Curves that a test writes down, for searches that train nothing."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sft_core.search.rollouts import Curves, Rollout, Search


def curves(scores: Mapping[str, Sequence[float]], *, rows: int = 1, noise: float = 0.0, seed: int = 0) -> Curves:
    """Quarter epochs. Each row has the task's score, with noise of its own at each evaluation."""
    rng = np.random.default_rng(seed)
    num = len(next(iter(scores.values())))
    by_row = {task: np.array(one)[:, None] + noise * rng.standard_normal((num, rows)) for task, one in scores.items()}
    return Curves([0.25 * number for number in range(num)], by_row)


def run(search: Search, measure: Callable[[Rollout], Curves], at_most: int = 50) -> list[Rollout]:
    """The roll-outs of a search over measured curves."""
    rollouts: list[Rollout] = []
    while (rollout := search.propose()) is not None:
        rollouts.append(rollout)
        assert len(rollouts) <= at_most, "it does not end"
        search.observe(measure(rollout))
    return rollouts
