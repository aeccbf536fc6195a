"""selection: the rows whose loss is looked at while training goes on, where the recipe says so."""

from typing import Any

from sft_core.data.held_out import build_selection
from sft_core.pins import PinnedRecipe
from sft_core.store.stage import Needs, Part, Stage
from steps.tokenize import TOKENS


def _section(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    recipe = pinned.recipe
    return {
        "sources": recipe.sources,
        "selection_share": recipe.dataset_mixture.selection_share,
        "report_share": recipe.dataset_mixture.report_share,
        "max_rows": recipe.selection_rows,
        "max_length": recipe.packing.max_length,
        "smoke": recipe.limit is not None,
    }


def _needs(pinned: PinnedRecipe, part: Part) -> Needs:
    return {source: (TOKENS, {"source": source}) for source in pinned.recipe.sources}


SELECTION = Stage("selection", build_selection, section=_section, needs=_needs)
