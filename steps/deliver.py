"""deliver: the checkpoint that training ends with; of a search, the best evaluation of all its roll-outs."""

from typing import Any

from sft_core.pins import PinnedRecipe
from sft_core.search.deliver import build_delivered
from sft_core.store import Needs, Part, Stage, Unresolved
from steps.train import TRAINED


def _section(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    if pinned.delivered is None:
        raise Unresolved("the search is not over")
    return {"evaluation": pinned.delivered.evaluation}


def _needs(pinned: PinnedRecipe, part: Part) -> Needs:
    if pinned.delivered is not None:
        return {"trained": (TRAINED, {"round": pinned.delivered.round})}
    return {"trained": (TRAINED, {"round": len(pinned.rollouts) - 1})} if pinned.rollouts else {}


DELIVERED = Stage("delivered", build_delivered, section=_section, needs=_needs)


def delivered(pinned: PinnedRecipe) -> tuple[Stage, Part]:
    """What holds model/: without a search the one round of training itself."""
    return (TRAINED, {"round": 0}) if pinned.recipe.search is None else (DELIVERED, {})
