"""mix: which rows of which source are trained on. Cheap: a new weight or share re-tokenizes nothing."""

from pathlib import Path
from typing import Any

import numpy as np

from sft_core.data.mixture import AMOUNTS, Available, build_mixture, choose_rows, read_available, warnings
from sft_core.data.overlap.exclusions import REASONS
from sft_core.data.shares import normalised
from sft_core.pins import PinnedRecipe
from sft_core.report.plots import requested_and_achieved
from sft_core.store import Needs, Part, Ref, Stage, Store
from steps import decontaminate, deduplicate
from steps.cards import chart, facts, heading, table
from steps.tokenize import TOKENS

SHARES_HEADER = ("source", "asked", "available", "kept", "trained tokens: requested → achieved")


def _section(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    mixture = pinned.recipe.dataset_mixture
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
    """How much of a source a roll-out trains. part: `active` names those that it does, with their rows if it says."""
    if "active" not in part:
        return source
    active = dict(one.partition(":")[::2] for one in part["active"].split(","))
    if source["name"] not in active:
        return {**source, "weight": 0.0, "num_rows": None}
    rows = active[source["name"]]
    return {**source, "weight": None, "num_rows": int(rows)} if rows else source


def _needs(pinned: PinnedRecipe, part: Part) -> Needs:
    mixture = pinned.recipe.dataset_mixture
    needs: Needs = {source: (TOKENS, {"source": source}) for source in pinned.recipe.sources}
    if mixture.deduplication and mixture.trained_sources:
        needs["duplicates"] = (deduplicate.DUPLICATES, {})
    if mixture.decontamination:
        for source in mixture.trained_sources:
            needs[f"contaminated:{source}"] = (decontaminate.CONTAMINATION, {"source": source})
    return needs


MIXTURE = Stage("mixture", build_mixture, section=_section, needs=_needs)


def card(store: Store, ref: Ref) -> list[Any]:
    manifest = store.manifest(ref)
    counts, inputs = manifest["counts"], {name: Ref(*address) for name, address in manifest["inputs"].items()}
    sources, columns = counts["sources"], ("train", "selection", "report", "kept", "tokens", "trained_tokens")
    shares = [{"name": name} | {key: one[key]["trained_tokens"] for key in _KINDS} for name, one in sources.items()]
    shown = {name.replace("_", " "): counts[name] for name in AMOUNTS} | {"sources": len(sources)}
    components = [
        *facts("Mixture", shown),
        table(("source", *columns), [(name, *(one[column] for column in columns)) for name, one in sources.items()]),
        heading("Shares: requested → achieved"),
        table(("source", "asked", "repeats", *(name.replace("_", " ") for name in AMOUNTS)), _share_rows(sources)),
        chart(requested_and_achieved(shares, x_title="share of trained tokens")),
    ]
    if found := warnings(counts):
        components += [heading("Not as asked"), table(("",), [(warning,) for warning in found])]
    contaminated = {name.partition(":")[2]: one for name, one in inputs.items() if name.startswith("contaminated:")}
    if "duplicates" in inputs or contaminated:
        components += [heading("Rows left out"), table(("source", *REASONS, "left"), _rows_left_out(sources))]
    if "duplicates" in inputs:
        components += deduplicate.card(store, inputs["duplicates"])
    return [*components, *(decontaminate.card(store, contaminated) if contaminated else [])]


_KINDS = ("requested", "achieved")


def _share_rows(sources: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [
        (name, wanted, f"{one['repeats']:.2f}", *(_change(one, amount) for amount in AMOUNTS))
        for (name, one), wanted in zip(sources.items(), _asked(list(sources.values())), strict=True)
    ]


def _rows_left_out(sources: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(name, *(one[reason] for reason in REASONS), one["available"]) for name, one in sources.items()]


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


def planned_shares(store: Store, pinned: PinnedRecipe) -> tuple[list[tuple[Any, ...]], list[str]]:
    """Rows under SHARES_HEADER, and what will not be as asked. Nothing is built; None stands for what is not known yet.

    Of a mixture that is there, its own counts; else those of the rows that will be chosen, once what they are chosen
    from is there.
    """
    section = _section(pinned, {})
    seen: dict[Any, Any] = {}
    located = store.locate(MIXTURE, pinned, {}, seen)
    if located.status == "hit" and located.ref is not None:
        counts = store.manifest(located.ref)["counts"]
    else:
        available = _known_available(store, pinned, section, seen)
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
    store: Store, pinned: PinnedRecipe, section: dict[str, Any], seen: dict[Any, Any]
) -> dict[str, Available | None]:
    """What each source has to draw from; None where a stage that says so is not built, or not on this machine."""
    inputs: dict[str, Path] = {}
    missing = set()
    for name, (stage, part) in _needs(pinned, {}).items():
        located = store.locate(stage, pinned, part, seen)
        if located.status == "hit" and located.ref is not None and store.is_here(located.ref):
            inputs[name] = store.path(located.ref)
        else:
            missing.add(name)
    shares = {key: section[key] for key in ("selection_share", "report_share")}
    return {
        source: None
        if missing & {source, "duplicates", f"contaminated:{source}"}
        else read_available(inputs, source, **shares)
        for source in pinned.recipe.sources
    }
