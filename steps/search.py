"""search: what its roll-outs have led to, read off the store; the flow's train step is its loop.

There is no other state: a search that was killed anywhere, or is given a larger cap, goes on from the outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sft_core.pins import PinnedRecipe
from sft_core.report.plots import rollouts
from sft_core.rounds import Point, Rollout, Rounds
from sft_core.search.journal import CURVES, Cost, Drawn, read_journal
from sft_core.search.registry import make_search
from sft_core.search.rollouts import Curves, Decision
from sft_core.search.strategy import SearchInput
from sft_core.store.lookups import Lookups
from sft_core.store.stage import Part
from sft_core.store.store import Store
from steps.cards import chart, facts, heading, table
from steps.mix import MIXTURE
from steps.train import TRAINED


class Measured(NamedTuple):
    """A roll-out that is done."""

    curves: Curves
    decision: Decision
    cost: Cost
    drawn: list[Drawn]


@dataclasses.dataclass(frozen=True)
class Searched:
    """How far a phase's search is: its rounds, of which the last is to be trained while the search is not over.

    pinned: the recipe with these rounds.
    """

    pinned: PinnedRecipe
    rounds: Rounds
    is_over: bool = False
    measured: list[Measured] = dataclasses.field(default_factory=list)
    ended_by: str | None = None


@dataclasses.dataclass(frozen=True)
class Progress:
    """pinned: the recipe with the rounds of its searches so far. searches: of each phase that has one."""

    pinned: PinnedRecipe
    searches: dict[str, Searched]

    @property
    def rounds(self) -> list[Part]:
        """The parts of all rounds that are done or can come next, in order; the checkpoints between them follow.

        They end with those of the first search that is not over: nobody knows yet how many it makes.
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
    """How far the searches of the recipe are; of a phase without one nothing is looked up."""
    lookups = lookups or Lookups()
    searches: dict[str, Searched] = {}
    for name, phase in pinned.recipe.phases.items():
        if phase.search is not None:
            comes_later = any(not search.is_over for search in searches.values())
            searches[name] = _searched(store, pinned, name, lookups, comes_later=comes_later)
            pinned = searches[name].pinned
    return Progress(pinned, searches)


def _searched(store: Store, pinned: PinnedRecipe, phase: str, lookups: Lookups, *, comes_later: bool) -> Searched:
    """comes_later: an earlier phase is not over, so that this one's first round has no key yet."""
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
        with store.open(located.ref, CURVES) as file:
            journal = read_journal(file)
        measured.append(Measured(journal.curves, search.observe(journal.curves), journal.cost, journal.drawn))
    rounds = dataclasses.replace(rounds, best=search.best)
    return Searched(_with_rounds(pinned, phase, rounds), rounds, True, measured, search.ended_by)


def _with_rounds(pinned: PinnedRecipe, phase: str, rounds: Rounds) -> PinnedRecipe:
    return dataclasses.replace(pinned, rounds={**pinned.rounds, phase: rounds})


def is_trained(store: Store, known: Progress) -> bool:
    """Whether every round of every phase is there."""
    lookups = Lookups()
    return all(search.is_over for search in known.searches.values()) and all(
        store.locate(TRAINED, known.pinned, part, lookups).status == "hit" for part in known.rounds
    )


def place(store: Store, known: Progress) -> str:
    """Where it is trained: `here`, in this task or because it is all there already, or on several `nodes`."""
    on_nodes = known.pinned.recipe.runtime.num_nodes > 1 and not is_trained(store, known)
    return "nodes" if on_nodes else "here"


def _sizes(store: Store, pinned: PinnedRecipe, phase: str, lookups: Lookups) -> dict[str, int]:
    located = store.locate(MIXTURE, pinned, pinned.part_of(phase), lookups)
    if located.status != "hit" or located.ref is None:
        return {}
    sources = store.manifest(located.ref)["counts"]["sources"]
    return {name: counts["kept"] for name, counts in sources.items()}


HEADER = ("roll-out", "trained", "dropped", "goes on from", "why")  # a card is narrow: what is wider is cut off


def card(known: Progress, phase: str) -> list[Any]:
    """A phase's roll-outs so far: their curves, who was dropped and where it went back to, and what that took.

    Nothing without a search.
    """
    search, keys = known.searches.get(phase), known.pinned.recipe.phases[phase]
    if search is None or keys.search is None or not search.measured:
        return []
    everything = keys.dataset_mixture.trained_sources
    shown: dict[str, Any] = {
        "strategy": keys.search.title,
        "roll-outs": len(search.measured),
        "epochs kept": f"{search.measured[-1].decision.epochs:g}",
        **_costs(search, everything),
    }
    if search.is_over and (best := search.rounds.best) is not None:
        score = search.measured[best.round].curves.pooled()[best.evaluation]
        shown |= {"over": search.ended_by, "delivered": f"{_place(best)}, pooled score {score:.4f}"}
    rows = [_told(*pair, everything) for pair in zip(search.rounds.rollouts, search.measured, strict=False)]
    shared, header, evidence = _evidence(search.measured[-1].decision)
    return [
        *facts("Search", shown),
        chart(rollouts(_points(search))),
        heading("Decisions"),
        table(HEADER, rows),
        heading(f"What the last one rests on{shared}"),
        table(header, evidence),
        *_what_was_drawn(search.measured[-1].drawn),
    ]


def _costs(search: Searched, tasks: Sequence[str]) -> dict[str, str]:
    """What the roll-outs took, beside what plain SFT takes for as many epochs over everything."""
    costs = [measured.cost for measured in search.measured]
    training, evaluation = (sum(getattr(one, f"{what}_flops") for one in costs) for what in ("training", "evaluation"))
    per_epoch: dict[tuple[str, ...], float] = {}  # of the tasks that a roll-out trained
    for rollout, one in zip(search.rounds.rollouts, search.measured, strict=False):
        if rollout.rows is None and one.curves.epochs[-1]:
            per_epoch.setdefault(rollout.active, one.cost.training_flops / one.curves.epochs[-1])
    everything = tuple(tasks)
    alone = [per_epoch.get((task,)) for task in everything]
    plain = per_epoch.get(everything) or (sum(filter(None, alone)) if None not in alone else None)
    kept = search.measured[-1].decision.epochs
    against = f"; {training / (plain * kept):.2f} x plain SFT of {kept:g} epochs" if plain and kept else ""
    most = max(costs, key=lambda one: one.most_kept * one.checkpoint_bytes)
    return {
        "training, PFLOPs": f"{training / 1e15:.4g}{against}",
        "evaluation beside it, PFLOPs": f"{evaluation / 1e15:.4g} ({evaluation / training:.0%} of training)",
        "evaluations' weights on the disk at once, at most": (
            f"{most.most_kept}, {most.most_kept * most.checkpoint_bytes / 2**30:.3g} GiB"
        ),
    }


def _what_was_drawn(drawn: list[Drawn]) -> list[Any]:
    """Of a sampler that learns, what it drew from: at most a dozen moments, evenly over the roll-out."""
    if not drawn:
        return []
    moments = [drawn[round(place)] for place in np.linspace(0, len(drawn) - 1, min(len(drawn), 12))]
    rows = [(f"{one.epochs:.3g}", *(f"{share:.1%}" for share in one.shares.values())) for one in moments]
    return [heading("Share of each task, by epoch"), table(("epoch", *moments[0].shares), rows)]


def _place(point: Point | None) -> str:
    return "the start model" if point is None else f"roll-out {point.round}, evaluation {point.evaluation}"


def _told(rollout: Rollout, measured: Measured, everything: Sequence[str]) -> tuple[Any, ...]:
    decision = measured.decision
    back = f"; back again: {', '.join(decision.readmitted)}" if decision.readmitted else ""
    return (
        f"{rollout.round}, from {_place(rollout.start)}",
        f"{_which(rollout.active, everything)}, {measured.curves.epochs[-1]:g} of {rollout.epochs:g} epochs",
        (", ".join(decision.dropped) or "nobody") + back,
        f"{_place(decision.start)}, {measured.curves.epochs[decision.start.evaluation]:g} epochs in",
        decision.reason,
    )


def _which(active: Sequence[str], everything: Sequence[str]) -> str:
    """Tasks in few words: the names of those that are in, or of those that are not."""
    out = [task for task in everything if task not in active]
    if not out:
        return f"all {len(everything)} tasks"
    if len(out) < len(active):
        return f"{len(active)} tasks, without {', '.join(out)}"
    return ", ".join(active)


def _evidence(decision: Decision) -> tuple[str, tuple[str, ...], list[tuple[Any, ...]]]:
    """What all tasks share, in words, and a table of what they do not, with the peak in any case."""

    def shown(value: Any) -> Any:
        return f"{value:.4g}" if isinstance(value, float) else value

    found = decision.evidence
    names = list(dict.fromkeys(name for one in found.values() for name in one))
    values = {name: [shown(one[name]) for one in found.values()] for name in names}
    shared = {name: column[0] for name, column in values.items() if len(column) > 1 and len({*column}) == 1}
    shared.pop("peak", None)
    names = [name for name in names if name not in shared]
    rows = [(task, *(values[name][number] for name in names)) for number, task in enumerate(found)]
    told = ", ".join(f"{name} {value}" for name, value in shared.items())
    return f" ({told})" if told else "", ("task", *names), rows


def _points(search: Searched) -> list[dict[str, Any]]:
    points = []
    for rollout, one in zip(search.rounds.rollouts, search.measured, strict=False):
        for task in one.curves.rows:
            peak = one.decision.evidence.get(task, {}).get("peak")
            points += [
                {
                    "rollout": f"roll-out {rollout.round}",
                    "epoch": epoch,
                    "task": task,
                    "score": float(score),
                    "is_active": task in rollout.active,
                    "is_peak": number == peak,
                }
                for number, (epoch, score) in enumerate(zip(one.curves.epochs, one.curves.of(task), strict=True))
            ]
    return points
