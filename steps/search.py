"""search: how far the searches of a recipe are, read off the store; the flow's train step is their loop.

A search has no other state: after a kill, or with a larger cap, it continues from the stored outputs.
"""

from __future__ import annotations

import dataclasses
import io
from typing import NamedTuple

from sft_core.data.mixing.mixture_counts import MixtureCounts
from sft_core.pins.pinned import PinnedRecipe
from sft_core.rounds import Rounds
from sft_core.search.journal import CURVES, Cost, Drawn, read_journal
from sft_core.search.registry import make_search
from sft_core.search.rollouts import Curves, Decision
from sft_core.search.strategy import SearchInput
from sft_core.store.lookups import Lookups
from sft_core.store.stage import Part
from sft_core.store.store import Store
from steps.mix import MIXTURE
from steps.train import TRAINED


class Measured(NamedTuple):
    """The measurements of a finished roll-out, and the decision on them."""

    curves: Curves
    decision: Decision
    cost: Cost
    drawn: list[Drawn]


@dataclasses.dataclass(frozen=True)
class Searched:
    """How far a phase's search is. Until it is over, the last of its rounds is still to be trained.

    pinned: the recipe with these rounds.
    """

    pinned: PinnedRecipe
    rounds: Rounds
    is_over: bool = False
    measured: list[Measured] = dataclasses.field(default_factory=list)
    ended_by: str | None = None


@dataclasses.dataclass(frozen=True)
class Progress:
    """pinned: the recipe with the rounds of its searches so far. searches: by phase, where a phase has a search."""

    pinned: PinnedRecipe
    searches: dict[str, Searched]

    @property
    def rounds(self) -> list[Part]:
        """The parts of TRAINED for all rounds so far and the next ones, in order.

        They end with the first search that is not over: its number of rounds is not known yet.
        """
        parts: list[Part] = []
        for name in self.pinned.recipe.phases:
            search = self.searches.get(name)
            num_rounds = 1 if search is None else len(search.rounds.rollouts)
            parts += [self.pinned.part_of(name, round=number) for number in range(num_rounds)]
            if search is not None and not search.is_over:
                break
        return parts


def progress(store: Store, pinned: PinnedRecipe, lookups: Lookups | None = None) -> Progress:
    """How far the searches of the recipe are. Looks up nothing for phases without a search."""
    lookups = lookups or Lookups()
    searches: dict[str, Searched] = {}
    for name, phase in pinned.recipe.phases.items():
        if phase.search is not None:
            comes_later = any(not search.is_over for search in searches.values())
            searches[name] = _searched(store, pinned, name, lookups, comes_later=comes_later)
            pinned = searches[name].pinned
    return Progress(pinned, searches)


def _searched(store: Store, pinned: PinnedRecipe, phase: str, lookups: Lookups, *, comes_later: bool) -> Searched:
    """comes_later: an earlier phase's search is not over, so this phase's first round has no key yet."""
    keys = pinned.recipe.phases[phase]
    assert keys.search is not None
    sizes = _sizes(store, pinned, phase, lookups)
    search = make_search(SearchInput(keys.search, keys.dataset_mixture.trained_sources, sizes))
    measured: list[Measured] = []
    rounds = Rounds(sizes=sizes)
    while (rollout := search.propose()) is not None:
        rounds = dataclasses.replace(rounds, rollouts=(*rounds.rollouts, rollout))
        pinned = _with_rounds(pinned, phase, rounds)
        if comes_later:
            return Searched(pinned, rounds)
        located = store.locate(TRAINED, pinned, pinned.part_of(phase, round=rollout.round), lookups)
        if located.status != "hit" or located.ref is None:
            return Searched(pinned, rounds, False, measured)
        journal = read_journal(io.BytesIO(store.read(located.ref, CURVES)))
        measured.append(Measured(journal.curves, search.observe(journal.curves), journal.cost, journal.drawn))
    rounds = dataclasses.replace(rounds, best=search.best)
    return Searched(_with_rounds(pinned, phase, rounds), rounds, True, measured, search.ended_by)


def _with_rounds(pinned: PinnedRecipe, phase: str, rounds: Rounds) -> PinnedRecipe:
    return dataclasses.replace(pinned, rounds={**pinned.rounds, phase: rounds})


def is_trained(store: Store, known: Progress) -> bool:
    """Whether every round of every phase is in the store."""
    lookups = Lookups()
    return all(search.is_over for search in known.searches.values()) and all(
        store.locate(TRAINED, known.pinned, part, lookups).status == "hit" for part in known.rounds
    )


def place(store: Store, known: Progress) -> str:
    """Where training takes place: on several `nodes`, or `here`, in this task (also when nothing is left to train)."""
    on_nodes = known.pinned.recipe.runtime.num_nodes > 1 and not is_trained(store, known)
    return "nodes" if on_nodes else "here"


def _sizes(store: Store, pinned: PinnedRecipe, phase: str, lookups: Lookups) -> dict[str, int]:
    """The training rows of each source; empty before the mixture is built."""
    located = store.locate(MIXTURE, pinned, pinned.part_of(phase), lookups)
    if located.status != "hit" or located.ref is None:
        return {}
    mixture = MixtureCounts.from_json(store.manifest(located.ref)["counts"])
    return {name: source.kept for name, source in mixture.sources.items()}
