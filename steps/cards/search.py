"""A search on the card of train: its roll-outs, decisions and costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sft_core.report.plots import CurvePoint, rollouts
from sft_core.rounds import Point, Rollout
from sft_core.search.journal import Drawn
from sft_core.search.rollouts import Decision
from steps.cards.pieces import chart, facts, heading, table
from steps.search import Measured, Progress, Searched

HEADER = ("roll-out", "trained", "dropped", "goes on from", "why")  # a card is narrow and cuts off more columns


def card(known: Progress, phase: str) -> list[Any]:
    """A phase's roll-outs so far: curves, decisions and costs; nothing without a search."""
    search, keys = known.searches.get(phase), known.pinned.recipe.phases[phase]
    if search is None or keys.search is None or not search.measured:
        return []
    everything = keys.dataset_mixture.trained_sources
    shown: dict[str, object] = {
        "strategy": keys.search.title,
        "roll-outs": len(search.measured),
        "epochs kept": f"{search.measured[-1].decision.epochs:g}",
        **_costs(search, everything),
    }
    if search.is_over and (best := search.rounds.best) is not None:
        score = search.measured[best.round].curves.pooled()[best.evaluation]
        shown |= {"over": search.ended_by, "delivered": f"{_place(best)}, pooled score {score:.4f}"}
    rows = [_decision_row(*pair, everything) for pair in zip(search.rounds.rollouts, search.measured, strict=False)]
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
    """The costs of the roll-outs, compared with plain SFT on all tasks for as many epochs."""
    costs = [measured.cost for measured in search.measured]
    training, evaluation = sum(cost.training_flops for cost in costs), sum(cost.evaluation_flops for cost in costs)
    per_epoch: dict[tuple[str, ...], float] = {}  # FLOPs, by the tasks that a roll-out trains
    for rollout, measured in zip(search.rounds.rollouts, search.measured, strict=False):
        if rollout.rows is None and measured.curves.epochs[-1]:
            per_epoch.setdefault(rollout.active, measured.cost.training_flops / measured.curves.epochs[-1])
    everything = tuple(tasks)
    alone = [per_epoch.get((task,)) for task in everything]
    plain = per_epoch.get(everything) or (sum(filter(None, alone)) if None not in alone else None)
    kept = search.measured[-1].decision.epochs
    against = f"; {training / (plain * kept):.2f} x plain SFT of {kept:g} epochs" if plain and kept else ""
    largest = max(costs, key=lambda cost: cost.most_kept * cost.checkpoint_bytes)
    return {
        "training, PFLOPs": f"{training / 1e15:.4g}{against}",
        "evaluation beside it, PFLOPs": f"{evaluation / 1e15:.4g} ({evaluation / training:.0%} of training)",
        "evaluations' weights on the disk at once, at most": (
            f"{largest.most_kept}, {largest.most_kept * largest.checkpoint_bytes / 2**30:.3g} GiB"
        ),
    }


def _what_was_drawn(drawn: list[Drawn]) -> list[Any]:
    """The shares by which a learning sampler drew its tasks, at a dozen moments at most, evenly over the roll-out."""
    if not drawn:
        return []
    moments = [drawn[round(place)] for place in np.linspace(0, len(drawn) - 1, min(len(drawn), 12))]
    rows = [(f"{moment.epochs:.3g}", *(f"{share:.1%}" for share in moment.shares.values())) for moment in moments]
    return [heading("Share of each task, by epoch"), table(("epoch", *moments[0].shares), rows)]


def _place(point: Point | None) -> str:
    return "the start model" if point is None else f"roll-out {point.round}, evaluation {point.evaluation}"


def _decision_row(rollout: Rollout, measured: Measured, everything: Sequence[str]) -> tuple[str, ...]:
    """A row under HEADER."""
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
    """The active tasks in few words: their names, or the names of the others."""
    out = [task for task in everything if task not in active]
    if not out:
        return f"all {len(everything)} tasks"
    if len(out) < len(active):
        return f"{len(active)} tasks, without {', '.join(out)}"
    return ", ".join(active)


def _evidence(decision: Decision) -> tuple[str, tuple[str, ...], list[tuple[object, ...]]]:
    """(text of the values that all tasks share, header and rows of a table of the others and of the peaks)."""

    def shown(value: object) -> object:
        return f"{value:.4g}" if isinstance(value, float) else value

    by_task = decision.evidence
    names = list(dict.fromkeys(name for evidence in by_task.values() for name in evidence))
    values = {name: [shown(evidence[name]) for evidence in by_task.values()] for name in names}
    shared = {name: column[0] for name, column in values.items() if len(column) > 1 and len({*column}) == 1}
    shared.pop("peak", None)
    names = [name for name in names if name not in shared]
    rows = [(task, *(values[name][number] for name in names)) for number, task in enumerate(by_task)]
    shared_text = ", ".join(f"{name} {value}" for name, value in shared.items())
    return f" ({shared_text})" if shared_text else "", ("task", *names), rows


def _points(search: Searched) -> list[CurvePoint]:
    points = []
    for rollout, measured in zip(search.rounds.rollouts, search.measured, strict=False):
        curves = measured.curves
        for task in curves.rows:
            peak = measured.decision.evidence.get(task, {}).get("peak")
            points += [
                CurvePoint(
                    rollout=f"roll-out {rollout.round}",
                    epoch=epoch,
                    task=task,
                    score=float(score),
                    is_active=task in rollout.active,
                    is_peak=number == peak,
                )
                for number, (epoch, score) in enumerate(zip(curves.epochs, curves.of(task), strict=True))
            ]
    return points
