"""The card of mix: what the recipe asks of each source, what it gets, and what became of its rows."""

from __future__ import annotations

from typing import Any

from sft_core.data.mixing.mixture import AMOUNTS, warnings
from sft_core.data.overlap.exclusions import REASONS
from sft_core.report.plots import lengths_by_source, requested_and_achieved
from sft_core.store.ref import Ref
from sft_core.store.store import Store
from steps.cards import contamination, duplicates
from steps.cards.pieces import bins, chart, facts, heading, rejects, table
from steps.mix import KINDS, as_shares, asked_amounts, spaced


def card(store: Store, ref: Ref) -> list[Any]:
    manifest = store.manifest(ref)
    counts, inputs = manifest["counts"], {name: Ref(*address) for name, address in manifest["inputs"].items()}
    sources = counts["sources"]
    shown = {spaced(name): counts[name] for name in AMOUNTS} | {"sources": len(sources)}
    header = ("source", "asked", "repeats", *map(spaced, AMOUNTS))
    components = [
        *facts("Mixture", shown),
        heading("Shares: requested → achieved"),
        chart(requested_and_achieved(_shares(sources))),
        table(header, _share_rows(sources)),
    ]
    if found := warnings(counts):
        components += [heading("Not as asked"), table(("",), [(warning,) for warning in found])]
    components += [
        heading("Lengths of the rows that are kept"),
        chart(lengths_by_source({spaced(kind): _bins(sources, f"rows_by_{kind}") for kind in AMOUNTS[1:]})),
        table(("source", "rows kept", "tokens", "trained tokens", "tokens a row", "trained"), _amounts(sources)),
        heading("What became of the rows"),
        table(*_journeys(sources)),
        *rejects({name: one["rejected"] for name, one in sources.items()}),
    ]
    contaminated = {name.partition(":")[2]: one for name, one in inputs.items() if name.startswith("contaminated:")}
    if "duplicates" in inputs:
        components += duplicates.card(store, inputs["duplicates"])
    return [*components, *(contamination.card(store, contaminated) if contaminated else [])]


# What a source's rows come to, in the order in which it happens: columns that are 0 for every source are left out.
_JOURNEY = (
    ("rows_read", "read"),
    ("rejected", "rejected"),
    ("rows", "rows"),
    ("selection", "selection"),
    ("report", "report"),
    ("without_trained_token", "train nothing"),
    *((reason, reason) for reason in REASONS),
    ("available", "left"),
    ("kept", "kept"),
)


def _journeys(sources: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Header and rows of a table."""
    told = {
        name: one | {"rejected": sum(sum(reasons.values()) for reasons in one["rejected"].values())}
        for name, one in sources.items()
    }
    columns = [(key, title) for key, title in _JOURNEY if any(one[key] for one in told.values())]
    rows = [(name, *(one[key] for key, _ in columns)) for name, one in told.items()]
    return ("source", *(title for _, title in columns)), rows


def _amounts(sources: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [
        (
            name,
            one["kept"],
            one["tokens"],
            one["trained_tokens"],
            f"{one['tokens'] / max(1, one['kept']):,.1f}",
            f"{one['trained_tokens'] / max(1, one['tokens']):.1%}",
        )
        for name, one in sources.items()
    ]


def _shares(sources: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": name, "amount": spaced(amount)} | {kind: one[kind][amount] for kind in KINDS}
        for name, one in sources.items()
        for amount in AMOUNTS
    ]


def _bins(sources: dict[str, Any], key: str) -> dict[str, list[tuple[int, int, int]]]:
    return {name: bins(one[key]) for name, one in sources.items()}


def _share_rows(sources: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [
        (name, wanted, f"{one['repeats']:.2f}", *(as_shares(one, amount) for amount in AMOUNTS))
        for (name, one), wanted in zip(sources.items(), asked_amounts(list(sources.values())), strict=True)
    ]
