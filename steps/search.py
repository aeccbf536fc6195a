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
from sft_core.search.journal import CURVES, Cost, Drawn, read_journal
from sft_core.search.rollouts import Curves, Decision, Point, Rollout
from sft_core.search.strategies import make_search
from sft_core.store.lookups import Lookups
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
class Progress:
    """pinned: the recipe with the roll-outs so far, the last of which is to be trained while it is not over."""

    pinned: PinnedRecipe
    is_over: bool
    measured: list[Measured] = dataclasses.field(default_factory=list)
    ended_by: str | None = None

    @property
    def num_rounds(self) -> int:
        return num_rounds(self.pinned)


def progress(store: Store, pinned: PinnedRecipe, lookups: Lookups | None = None) -> Progress:
    """How far the recipe's training is; without a search it is one round over everything."""
    # One for all rounds: a later round's key is made of the earlier rounds' outputs, which the search does not change.
    lookups = Lookups() if lookups is None else lookups
    if pinned.recipe.search is None:
        return Progress(pinned, store.locate(TRAINED, pinned, {"round": 0}, lookups).status == "hit")
    settings: dict[str, Any] = pinned.recipe.search.model_dump(mode="json")
    pinned = dataclasses.replace(pinned, sizes=_sizes(store, pinned, lookups))
    search = make_search(settings, pinned.recipe.dataset_mixture.trained_sources, dict(pinned.sizes))
    measured: list[Measured] = []
    proposed: list[Rollout] = []
    while (rollout := search.propose()) is not None:
        proposed.append(rollout)
        pinned = dataclasses.replace(pinned, rollouts=tuple(proposed))
        located = store.locate(TRAINED, pinned, {"round": rollout.round}, lookups)
        if located.status != "hit" or located.ref is None:
            return Progress(pinned, False, measured)
        with store.open(located.ref, CURVES) as file:
            journal = read_journal(file)
        measured.append(Measured(journal.curves, search.observe(journal.curves), journal.cost, journal.drawn))
    over = dataclasses.replace(pinned, delivered=search.best)
    return Progress(over, True, measured, search.ended_by)


def num_rounds(pinned: PinnedRecipe) -> int:
    """Rounds of training that are done or come next. pinned: as progress has it."""
    return max(1, len(pinned.rollouts))


def place(store: Store, pinned: PinnedRecipe) -> str:
    """Where it is trained: `here`, in this task or because it is all there already, or on several `nodes`."""
    on_nodes = pinned.recipe.runtime.num_nodes > 1 and not progress(store, pinned).is_over
    return "nodes" if on_nodes else "here"


def _sizes(store: Store, pinned: PinnedRecipe, lookups: Lookups) -> tuple[tuple[str, int], ...]:
    located = store.locate(MIXTURE, pinned, {}, lookups)
    if located.status != "hit" or located.ref is None:
        return ()
    sources = store.manifest(located.ref)["counts"]["sources"]
    return tuple((name, one["kept"]) for name, one in sources.items())


HEADER = ("roll-out", "trained", "dropped", "goes on from", "why")  # a card is narrow: what is wider is cut off


def card(store: Store, pinned: PinnedRecipe) -> list[Any]:
    """The roll-outs so far: their curves, who was dropped and where it went back to, and what that took.

    Nothing without a search.
    """
    if pinned.recipe.search is None or not (found := progress(store, pinned)).measured:
        return []
    shown: dict[str, Any] = {
        "strategy": _strategy(found.pinned),
        "roll-outs": len(found.measured),
        "epochs kept": f"{found.measured[-1].decision.epochs:g}",
        **_costs(found),
    }
    if found.is_over and (best := found.pinned.delivered) is not None:
        score = found.measured[best.round].curves.pooled()[best.evaluation]
        shown |= {"over": found.ended_by, "delivered": f"{_place(best)}, pooled score {score:.4f}"}
    everything = found.pinned.recipe.dataset_mixture.trained_sources
    rows = [_told(*pair, everything) for pair in zip(found.pinned.rollouts, found.measured, strict=False)]
    shared, header, evidence = _evidence(found.measured[-1].decision)
    return [
        *facts("Search", shown),
        chart(rollouts(_points(found))),
        heading("Decisions"),
        table(HEADER, rows),
        heading(f"What the last one rests on{shared}"),
        table(header, evidence),
        *_what_was_drawn(found.measured[-1].drawn),
    ]


def _costs(found: Progress) -> dict[str, str]:
    """What the roll-outs took, beside what plain SFT takes for as many epochs over everything."""
    costs = [one.cost for one in found.measured]
    training, evaluation = (sum(getattr(one, f"{what}_flops") for one in costs) for what in ("training", "evaluation"))
    per_epoch: dict[tuple[str, ...], float] = {}  # of the tasks that a roll-out trained
    for rollout, one in zip(found.pinned.rollouts, found.measured, strict=False):
        if rollout.rows is None and one.curves.epochs[-1]:
            per_epoch.setdefault(rollout.active, one.cost.training_flops / one.curves.epochs[-1])
    everything = tuple(found.pinned.recipe.dataset_mixture.trained_sources)
    alone = [per_epoch.get((task,)) for task in everything]
    plain = per_epoch.get(everything) or (sum(filter(None, alone)) if None not in alone else None)
    kept = found.measured[-1].decision.epochs
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


def _strategy(pinned: PinnedRecipe) -> str:
    search = pinned.recipe.search
    assert search is not None
    return f"{search.strategy} ({search.preset})" if search.strategy == "msft" else search.strategy


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


def _points(found: Progress) -> list[dict[str, Any]]:
    points = []
    for rollout, one in zip(found.pinned.rollouts, found.measured, strict=False):
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
