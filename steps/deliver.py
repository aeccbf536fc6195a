"""deliver: the checkpoint that training ends with; of a search, the best evaluation of all its roll-outs."""

from typing import Any

from sft_core.pins import PinnedRecipe
from sft_core.search.deliver import build_delivered
from sft_core.store.stage import Needs, Part, Stage, Unresolved
from steps.train import TRAINED


def _section(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    if pinned.delivered is None:
        raise Unresolved("the search is not over")
    return {"evaluation": pinned.delivered.evaluation}


def round_of(pinned: PinnedRecipe) -> Part:
    """The round of training that ends with what is delivered; while a search is not over, the last that is known."""
    if pinned.recipe.search is None:
        return {"round": 0}
    return {"round": len(pinned.rollouts) - 1 if pinned.delivered is None else pinned.delivered.round}


def _needs(pinned: PinnedRecipe, part: Part) -> Needs:
    return {"trained": (TRAINED, round_of(pinned))}


DELIVERED = Stage("delivered", build_delivered, section=_section, needs=_needs)


def delivered(pinned: PinnedRecipe) -> tuple[Stage, Part]:
    """What holds model/: without a search the one round of training itself."""
    return (TRAINED, {"round": 0}) if pinned.recipe.search is None else (DELIVERED, {})
