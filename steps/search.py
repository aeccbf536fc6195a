"""search: what its roll-outs have led to, read off the store; the flow's train step is its loop.

There is no other state: a search that was killed anywhere, or is given a larger cap, goes on from the outputs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sft_core.pins import PinnedRecipe
from sft_core.search.journal import CURVES, read_curves
from sft_core.search.rollouts import Decision
from sft_core.search.strategies import make_search
from sft_core.store import Store
from steps.mix import MIXTURE
from steps.train import TRAINED


@dataclasses.dataclass(frozen=True)
class Progress:
    """pinned: the recipe with the roll-outs so far, the last of which is to be trained while it is not over."""

    pinned: PinnedRecipe
    num_rounds: int  # that are known: those done and the next
    is_over: bool
    decisions: list[Decision] = dataclasses.field(default_factory=list)
    ended_by: str | None = None


def progress(store: Store, pinned: PinnedRecipe) -> Progress:
    """How far the recipe's training is; without a search it is one round over everything."""
    if pinned.recipe.search is None:
        return Progress(pinned, 1, store.locate(TRAINED, pinned, {"round": 0}).status == "hit")
    settings: dict[str, Any] = pinned.recipe.search.model_dump(mode="json")
    pinned = dataclasses.replace(pinned, sizes=_sizes(store, pinned))
    search = make_search(settings, pinned.recipe.dataset_mixture.trained_sources, dict(pinned.sizes))
    decisions: list[Decision] = []
    rollouts = []
    while (rollout := search.propose()) is not None:
        rollouts.append(rollout)
        pinned = dataclasses.replace(pinned, rollouts=tuple(rollouts))
        located = store.locate(TRAINED, pinned, {"round": rollout.round})
        if located.status != "hit" or located.ref is None:
            return Progress(pinned, len(rollouts), False, decisions)
        with store.open(located.ref, CURVES) as file:
            decisions.append(search.observe(read_curves(file)))
    over = dataclasses.replace(pinned, delivered=search.best)
    return Progress(over, len(rollouts), True, decisions, search.ended_by)


def place(store: Store, pinned: PinnedRecipe) -> str:
    """Where it is trained: `here`, in this task or because it is all there already, or on several `nodes`."""
    on_nodes = pinned.recipe.runtime.num_nodes > 1 and not progress(store, pinned).is_over
    return "nodes" if on_nodes else "here"


def _sizes(store: Store, pinned: PinnedRecipe) -> tuple[tuple[str, int], ...]:
    located = store.locate(MIXTURE, pinned, {})
    if located.status != "hit" or located.ref is None:
        return ()
    sources = store.manifest(located.ref)["counts"]["sources"]
    return tuple((name, one["kept"]) for name, one in sources.items())
