"""pack: rows into packs of at most max_length tokens, first-fit-decreasing over the whole mixture."""

from typing import Any

from sft_core.data.packing import build_packs
from sft_core.pins import PinnedRecipe
from sft_core.store import Needs, Part, Ref, Stage, Store
from steps.cards import facts, table
from steps.mix import MIXTURE
from steps.tokenize import TOKENS


def _section(pinned: PinnedRecipe, part: Part) -> dict:
    packing = pinned.recipe.packing
    return {
        "sources": pinned.recipe.sources,
        "packing_strategy": packing.packing_strategy,
        "max_length": packing.max_length,
        "over_long": packing.over_long,
        "loss_scope": pinned.recipe.training.loss_scope,
    }


def _needs(pinned: PinnedRecipe, part: Part) -> Needs:
    tokens: Needs = {source: (TOKENS, {"source": source}) for source in pinned.recipe.sources}
    return {"mixture": (MIXTURE, {}), **tokens}


PACKED = Stage("packed", build_packs, section=_section, needs=_needs)


def card(store: Store, ref: Ref) -> list[Any]:
    counts = store.manifest(ref)["counts"]
    dropped, truncated = counts["dropped"], counts["truncated"]
    shown = {
        "packs": counts["packs"],
        "documents": counts["documents"],
        "documents a pack": f"{counts['documents'] / counts['packs']:.1f}",
        "tokens": counts["tokens"],
        "max_length": counts["max_length"],
        "fill": f"{counts['fill']:.2%}",
        "over-long rows dropped": sum(dropped.values()),
        "over-long rows truncated": sum(truncated.values()),
    }
    lost = [(name, dropped.get(name, 0), truncated.get(name, 0)) for name in sorted({*dropped, *truncated})]
    return [*facts("Packs", shown), *([table(("source", "dropped", "truncated"), lost)] if lost else [])]
