"""mix: the rows of each source to train on. A new weight or share tokenizes nothing anew."""

from pathlib import Path
from typing import Any

import numpy as np

from sft_core.data.mixing.mixture import (
    Available,
    build_mixture,
    choose_rows,
    read_available,
    warnings,
)
from sft_core.data.mixing.mixture_counts import MixedSource, MixtureCounts
from sft_core.data.mixing.shares import SourceRequest, normalised
from sft_core.pins.pinned import PinnedRecipe
from sft_core.store.lookups import Lookups
from sft_core.store.stage import Needs, Part, Stage
from sft_core.store.store import Store
from steps.decontaminate import CONTAMINATION
from steps.deduplicate import DUPLICATES
from steps.tokenize import INDEX, TOKENS

SHARES_HEADER = ("source", "asked", "available", "kept", "trained tokens: requested → achieved")


def _section(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    mixture = pinned.phase(part).dataset_mixture
    by_token = mixture.datasets[0].trained_token_share is not None
    return {
        "sources": _requests(pinned, part),
        "selection_share": mixture.selection_share,
        "report_share": mixture.report_share,
        "seed": mixture.seed,
        "num_trained_tokens": mixture.num_trained_tokens,
        "max_repeats": mixture.max_repeats if by_token else None,
    }


def _requests(pinned: PinnedRecipe, part: Part) -> list[SourceRequest]:
    sources: list[SourceRequest] = [
        {
            "name": dataset.source,
            "weight": dataset.weight,
            "num_rows": dataset.num_rows,
            "trained_token_share": dataset.trained_token_share,
        }
        for dataset in pinned.phase(part).dataset_mixture.datasets
    ]
    return [_in_rollout(source, part) for source in sources]


def _in_rollout(source: SourceRequest, part: Part) -> SourceRequest:
    """How much of a source a roll-out trains. part: `rows` has the number of rows of each trained source; None: as many
    as the recipe says."""
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
        needs["duplicates"] = (DUPLICATES, pinned.part_of(pinned.phase_name(part)))
    if mixture.decontamination:
        for source in mixture.trained_sources:
            needs[f"contaminated:{source}"] = (CONTAMINATION, {"source": source})
    return needs


MIXTURE = Stage("mixture", build_mixture, section=_section, needs=_needs, reads={TOKENS.name: INDEX})


KINDS = ("requested", "achieved")


def spaced(name: str) -> str:
    return name.replace("_", " ")


def as_shares(source: MixedSource, amount: str) -> str:
    return " → ".join(f"{share:.1%}" for share in source.share(amount))


def asked_amounts(sources: list[SourceRequest]) -> list[str]:
    """What the recipe asks of each source, in words."""
    shares = normalised(np.array([source["trained_token_share"] or 0.0 for source in sources]))
    amounts = []
    for source, share in zip(sources, shares.tolist(), strict=True):
        if source["trained_token_share"] is not None:
            amounts.append(f"{share:.1%} of trained tokens")
        elif source["num_rows"] is not None:
            amounts.append(f"{source['num_rows']} rows")
        else:
            amounts.append("all rows" if source["weight"] is None else f"weight {source['weight']:g}")
    return amounts


def planned_shares(store: Store, pinned: PinnedRecipe, phase: str) -> tuple[list[tuple[Any, ...]], list[str]]:
    """Rows under SHARES_HEADER for a phase, and warnings where the mixture differs from the recipe. Builds nothing.

    A stored mixture gives its counts. Otherwise the rows are chosen as the builder will, if their inputs are stored;
    None stands for a number that is not known yet.
    """
    part = pinned.part_of(phase)
    section = _section(pinned, part)
    lookups = Lookups()
    located = store.locate(MIXTURE, pinned, part, lookups)
    if located.status == "hit" and located.ref is not None:
        counts = MixtureCounts.from_json(store.manifest(located.ref)["counts"])
    else:
        available = _known_available(store, pinned, part, section, lookups)
        known = [rows for rows in available.values() if rows is not None]
        if len(known) < len(available):
            requests = zip(available.items(), asked_amounts(section["sources"]), strict=True)
            return [
                (name, request, rows and rows.counts.available, None, None) for (name, rows), request in requests
            ], []
        options = {key: section[key] for key in ("seed", "num_trained_tokens", "max_repeats")}
        _, counts = choose_rows(known, section["sources"], **options)
    requests_in_words = asked_amounts([source.request(name) for name, source in counts.sources.items()])
    return [
        (name, request, source.available, source.kept, as_shares(source, "trained_tokens"))
        for (name, source), request in zip(counts.sources.items(), requests_in_words, strict=True)
    ], warnings(counts)


def _known_available(
    store: Store, pinned: PinnedRecipe, part: Part, section: dict[str, Any], lookups: Lookups
) -> dict[str, Available | None]:
    """The available rows of each source; None if a stage that decides on them is not built or not on this machine."""
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
