"""The card of mix: what the recipe asks of each source, what it gets, and what became of the source's rows."""

from __future__ import annotations

from typing import Any

from sft_core.data.mixing.mixture import warnings
from sft_core.data.mixing.mixture_counts import AMOUNTS, MixedSource, MixtureCounts
from sft_core.data.overlap.exclusions import REASONS
from sft_core.report.plots import lengths_by_source, requested_and_achieved
from sft_core.store.ref import Ref
from sft_core.store.store import Store
from steps.cards import contamination, duplicates
from steps.cards.pieces import bins, chart, facts, heading, rejects, table
from steps.mix import KINDS, as_shares, asked_amounts, spaced


def card(store: Store, ref: Ref) -> list[Any]:
    manifest = store.manifest(ref)
    inputs = {name: Ref(*address) for name, address in manifest["inputs"].items()}
    counts = MixtureCounts.from_json(manifest["counts"])
    sources = counts.sources
    shown = {spaced(name): getattr(counts, name) for name in AMOUNTS} | {"sources": len(sources)}
    header = ("source", "asked", "repeats", *map(spaced, AMOUNTS))
    components = [
        *facts("Mixture", shown),
        heading("Shares: requested → achieved"),
        chart(requested_and_achieved(_shares(sources))),
        table(header, _share_rows(sources)),
    ]
    if lines := warnings(counts):
        components += [heading("Not as asked"), table(("",), [(line,) for line in lines])]
    components += [
        heading("Lengths of the rows that are kept"),
        chart(lengths_by_source({spaced(kind): _bins(sources, f"rows_by_{kind}") for kind in AMOUNTS[1:]})),
        table(("source", "rows kept", "tokens", "trained tokens", "tokens a row", "trained"), _amounts(sources)),
        heading("What became of the rows"),
        table(*_journeys(sources)),
        *rejects({name: source.rejected or {} for name, source in sources.items()}),
    ]
    contaminated = {name.partition(":")[2]: ref for name, ref in inputs.items() if name.startswith("contaminated:")}
    if "duplicates" in inputs:
        components += duplicates.card(store, inputs["duplicates"])
    return [*components, *(contamination.card(store, contaminated) if contaminated else [])]


# What becomes of a source's rows, in the order of the steps. Columns that are 0 for every source are left out.
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


def _journeys(sources: dict[str, MixedSource]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Header and rows of a table."""
    values = {name: {key: _journey_value(source, key) for key, _ in _JOURNEY} for name, source in sources.items()}
    columns = [(key, title) for key, title in _JOURNEY if any(of_source[key] for of_source in values.values())]
    rows = [(name, *(of_source[key] for key, _ in columns)) for name, of_source in values.items()]
    return ("source", *(title for _, title in columns)), rows


def _journey_value(source: MixedSource, key: str) -> int | None:
    if key == "rejected":
        return sum(sum(reasons.values()) for reasons in (source.rejected or {}).values())
    count: int | None = getattr(source, key)
    return count


def _amounts(sources: dict[str, MixedSource]) -> list[tuple[Any, ...]]:
    return [
        (
            name,
            source.kept,
            source.tokens,
            source.trained_tokens,
            f"{source.tokens / max(1, source.kept):,.1f}",
            f"{source.trained_tokens / max(1, source.tokens):.1%}",
        )
        for name, source in sources.items()
    ]


def _shares(sources: dict[str, MixedSource]) -> list[dict[str, Any]]:
    return [
        {"name": name, "amount": spaced(amount), **dict(zip(KINDS, source.share(amount), strict=True))}
        for name, source in sources.items()
        for amount in AMOUNTS
    ]


def _bins(sources: dict[str, MixedSource], key: str) -> dict[str, list[tuple[int, int, int]]]:
    return {name: bins(getattr(source, key)) for name, source in sources.items()}


def _share_rows(sources: dict[str, MixedSource]) -> list[tuple[Any, ...]]:
    requests = asked_amounts([source.request(name) for name, source in sources.items()])
    return [
        (name, request, f"{source.repeats:.2f}", *(as_shares(source, amount) for amount in AMOUNTS))
        for (name, source), request in zip(sources.items(), requests, strict=True)
    ]
