"""selection: the rows whose loss is measured during training, if the recipe says so."""

from typing import Any

from sft_core.data.packing.held_out import build_selection
from sft_core.pins.pinned import PinnedRecipe
from sft_core.store.stage import Needs, Part, Stage
from steps.tokenize import INDEX, TOKENS


def _section(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    phase = pinned.phase(part)
    return {
        "sources": phase.sources,
        "selection_share": phase.dataset_mixture.selection_share,
        "report_share": phase.dataset_mixture.report_share,
        "max_rows": pinned.recipe.selection_rows(pinned.phase_name(part)),
        "max_length": phase.packing.max_length,
        "smoke": pinned.recipe.limit is not None,
    }


def _needs(pinned: PinnedRecipe, part: Part) -> Needs:
    return {source: (TOKENS, {"source": source}) for source in pinned.phase(part).sources}


SELECTION = Stage("selection", build_selection, section=_section, needs=_needs, reads={TOKENS.name: INDEX})
