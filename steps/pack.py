"""pack: rows into packs of at most max_length tokens, first-fit-decreasing over the whole mixture."""

from typing import Any

from sft_core.data.packing.over_long import windows_of
from sft_core.data.packing.plan import build_packs
from sft_core.pins.pinned import PinnedRecipe
from sft_core.store.stage import Needs, Part, Stage
from steps.mix import MIXTURE
from steps.tokenize import TOKENS
from steps.windows import WINDOWS


def _section(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    phase = pinned.phase(part)
    packing, search = phase.packing, phase.search
    by_source = {"by_source": True} if search is not None and search.needs.packs_by_source else {}
    return by_source | {
        "sources": phase.sources,
        "packing_strategy": packing.packing_strategy,
        "max_length": packing.max_length,
        "over_long": packing.over_long,
        "loss_scope": phase.training.loss_scope,
    }


def rows_to_pack(pinned: PinnedRecipe, part: Part) -> Needs:
    """The outputs that hold the rows of a plan: each source's tokens, and its windows where rows are split."""
    phase = pinned.phase(part)
    needs: Needs = {source: (TOKENS, {"source": source}) for source in phase.sources}
    if phase.packing.over_long == "split":
        needs |= {windows_of(source): (WINDOWS, {"source": source}) for source in phase.sources}
    return needs


def _needs(pinned: PinnedRecipe, part: Part) -> Needs:
    return {"mixture": (MIXTURE, part), **rows_to_pack(pinned, part)}


PACKED = Stage("packed", build_packs, section=_section, needs=_needs)
