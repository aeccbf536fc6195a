"""mix: which rows of which source are trained on. Cheap: a new weight or share re-tokenizes nothing."""

from pathlib import Path
from typing import Any

import numpy as np

from sft_core.data.mixing.mixture import Available, build_mixture, choose_rows, read_available, warnings
from sft_core.data.mixing.shares import normalised
from sft_core.pins.pinned import PinnedRecipe
from sft_core.store.lookups import Lookups
from sft_core.store.stage import Needs, Part, Stage
from sft_core.store.store import Store
from steps.decontaminate import CONTAMINATION
from steps.deduplicate import DUPLICATES
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
        needs["duplicates"] = (DUPLICATES, pinned.part_of(pinned.phase_name(part)))
    if mixture.decontamination:
        for source in mixture.trained_sources:
            needs[f"contaminated:{source}"] = (CONTAMINATION, {"source": source})
    return needs


MIXTURE = Stage("mixture", build_mixture, section=_section, needs=_needs)


KINDS = ("requested", "achieved")


def spaced(name: str) -> str:
    return name.replace("_", " ")


def as_shares(source: dict[str, Any], amount: str) -> str:
    return " → ".join(f"{source[kind][amount]:.1%}" for kind in KINDS)


def asked_amounts(sources: list[dict[str, Any]]) -> list[str]:
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
            rows = zip(available.items(), asked_amounts(section["sources"]), strict=True)
            return [(name, want, one and one.counts["available"], None, None) for (name, one), want in rows], []
        options = {key: section[key] for key in ("seed", "num_trained_tokens", "max_repeats")}
        _, counts = choose_rows([one for one in available.values() if one], section["sources"], **options)
    sources = counts["sources"]
    return [
        (name, wanted, one["available"], one["kept"], as_shares(one, "trained_tokens"))
        for (name, one), wanted in zip(sources.items(), asked_amounts(list(sources.values())), strict=True)
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
