"""Plain SFT as a search: it proposes one roll-out over the whole mixture, then stops.

A strategy is asked what to train next, given what has been trained; the flow's train step is its loop.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One round of training from a start checkpoint."""

    round: int


def propose(num_finished: int) -> Rollout | None:
    """The next roll-out after `num_finished` of them; None ends the search."""
    return Rollout(round=0) if num_finished == 0 else None
