"""mix: which rows of which source are trained on. Cheap: a new weight or share re-tokenizes nothing."""

from pathlib import Path
from typing import Any

import numpy as np

from sft_core.data.mixture import AMOUNTS, Available, build_mixture, choose_rows, read_available, warnings
from sft_core.data.overlap.exclusions import REASONS
from sft_core.data.shares import normalised
from sft_core.pins import PinnedRecipe
from sft_core.report.plots import lengths_by_source, requested_and_achieved
from sft_core.store.lookups import Lookups
from sft_core.store.ref import Ref
from sft_core.store.stage import Needs, Part, Stage
from sft_core.store.store import Store
from steps import decontaminate, deduplicate
from steps.cards import bins, chart, facts, heading, rejects, table
from steps.tokenize import TOKENS

SHARES_HEADER = ("source", "asked", "available", "kept", "trained tokens: requested → achieved")


def _section(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    mixture = pinned.phase(part).dataset_mixture
    by_token = mixture.datasets[0].trained_token_share is not None
    sources = [
        {
            "name": dataset.source,
            "weight": dataset.weight,
            "num_rows": dataset.num_rows,
            "trained_token_share": dataset.trained_token_share,
        }
        for dataset in mixture.datasets
    ]
    return {
        "sources": [_in_rollout(source, part) for source in sources],
        "selection_share": mixture.selection_share,
        "report_share": mixture.report_share,
        "seed": mixture.seed,
        "num_trained_tokens": mixture.num_trained_tokens,
        "max_repeats": mixture.max_repeats if by_token else None,
    }


def _in_rollout(source: dict[str, Any], part: Part) -> dict[str, Any]:
    """How much of a source a roll-out trains. part: `rows` has the sources that it does, with the number of rows of
    each; null: as many as the recipe says."""
    if "rows" not in part:
        return source
    if source["name"] not in part["rows"]:
        return {**source, "weight": 0.0, "num_rows": None}
    num_rows = part["rows"][source["name"]]
    return source if num_rows is None else {**source, "weight": None, "num_rows": num_rows}


def _needs(pinned: PinnedRecipe, part: Part) -> Needs:
    phase = pinned.phase(part)
    mixture = phase.dataset_mixture
    needs: Needs = {source: (TOKENS, {"source": source}) for source in phase.sources}
    if mixture.deduplication and mixture.trained_sources:
        needs["duplicates"] = (deduplicate.DUPLICATES, pinned.part_of(pinned.phase_name(part)))
    if mixture.decontamination:
        for source in mixture.trained_sources:
            needs[f"contaminated:{source}"] = (decontaminate.CONTAMINATION, {"source": source})
    return needs


MIXTURE = Stage("mixture", build_mixture, section=_section, needs=_needs)


def card(store: Store, ref: Ref) -> list[Any]:
    manifest = store.manifest(ref)
    counts, inputs = manifest["counts"], {name: Ref(*address) for name, address in manifest["inputs"].items()}
    sources = counts["sources"]
    shown = {_spaced(name): counts[name] for name in AMOUNTS} | {"sources": len(sources)}
    header = ("source", "asked", "repeats", *map(_spaced, AMOUNTS))
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
        chart(lengths_by_source({_spaced(kind): _bins(sources, f"rows_by_{kind}") for kind in AMOUNTS[1:]})),
        table(("source", "rows kept", "tokens", "trained tokens", "tokens a row", "trained"), _amounts(sources)),
        heading("What became of the rows"),
        table(*_journeys(sources)),
        *rejects({name: one["rejected"] for name, one in sources.items()}),
    ]
    contaminated = {name.partition(":")[2]: one for name, one in inputs.items() if name.startswith("contaminated:")}
    if "duplicates" in inputs:
        components += deduplicate.card(store, inputs["duplicates"])
    return [*components, *(decontaminate.card(store, contaminated) if contaminated else [])]


_KINDS = ("requested", "achieved")
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
        {"name": name, "amount": _spaced(amount)} | {kind: one[kind][amount] for kind in _KINDS}
        for name, one in sources.items()
        for amount in AMOUNTS
    ]


def _bins(sources: dict[str, Any], key: str) -> dict[str, list[tuple[int, int, int]]]:
    return {name: bins(one[key]) for name, one in sources.items()}


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _share_rows(sources: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [
        (name, wanted, f"{one['repeats']:.2f}", *(_change(one, amount) for amount in AMOUNTS))
        for (name, one), wanted in zip(sources.items(), _asked(list(sources.values())), strict=True)
    ]


def _change(source: dict[str, Any], amount: str) -> str:
    return " → ".join(f"{source[kind][amount]:.1%}" for kind in _KINDS)


def _asked(sources: list[dict[str, Any]]) -> list[str]:
    """What the recipe asks of each source. sources: weight, num_rows and trained_token_share."""
    shares = normalised(np.array([source["trained_token_share"] or 0.0 for source in sources]))
    found = []
    for source, share in zip(sources, shares.tolist(), strict=True):
        if source["trained_token_share"] is not None:
            found.append(f"{share:.1%} of trained tokens")
        elif source["num_rows"] is not None:
            found.append(f"{source['num_rows']} rows")
        else:
            found.append("all rows" if source["weight"] is None else f"weight {source['weight']:g}")
    return found


def planned_shares(store: Store, pinned: PinnedRecipe, phase: str) -> tuple[list[tuple[Any, ...]], list[str]]:
    """Of a phase: rows under SHARES_HEADER, and what will not be as asked.

    Nothing is built; None stands for what is not known yet.
    Of a mixture that is there, its own counts; else those of the rows that will be chosen, once what they are chosen
    from is there.
    """
    part = pinned.part_of(phase)
    section = _section(pinned, part)
    lookups = Lookups()
    located = store.locate(MIXTURE, pinned, part, lookups)
    if located.status == "hit" and located.ref is not None:
        counts = store.manifest(located.ref)["counts"]
    else:
        available = _known_available(store, pinned, part, section, lookups)
        if None in available.values():
            rows = zip(available.items(), _asked(section["sources"]), strict=True)
            return [(name, want, one and one.counts["available"], None, None) for (name, one), want in rows], []
        options = {key: section[key] for key in ("seed", "num_trained_tokens", "max_repeats")}
        _, counts = choose_rows([one for one in available.values() if one], section["sources"], **options)
    sources = counts["sources"]
    return [
        (name, wanted, one["available"], one["kept"], _change(one, "trained_tokens"))
        for (name, one), wanted in zip(sources.items(), _asked(list(sources.values())), strict=True)
    ], warnings(counts)


def _known_available(
    store: Store, pinned: PinnedRecipe, part: Part, section: dict[str, Any], lookups: Lookups
) -> dict[str, Available | None]:
    """What each source has to draw from; None where a stage that says so is not built, or not on this machine."""
    inputs: dict[str, Path] = {}
    missing = set()
    for name, (stage, needed) in _needs(pinned, part).items():
        located = store.locate(stage, pinned, needed, lookups)
        if located.status == "hit" and located.ref is not None and store.is_here(located.ref):
            inputs[name] = store.path(located.ref)
        else:
            missing.add(name)
    shares = {key: section[key] for key in ("selection_share", "report_share")}
    return {
        source: None
        if missing & {source, "duplicates", f"contaminated:{source}"}
        else read_available(inputs, source, **shares)
        for source in pinned.phase(part).sources
    }
