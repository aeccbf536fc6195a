"""decontaminate: the training rows that contain a prompt of an evaluation. Off unless the recipe asks for it."""

from typing import Any

from sft_core.data.overlap.decontamination import build_contamination
from sft_core.data.overlap.report_prompts import build_report_prompts
from sft_core.pins.pinned import PinnedRecipe
from sft_core.store.stage import Needs, Part, Stage
from steps.download import CONVERSATIONS


def _shares(pinned: PinnedRecipe, part: Part) -> dict[str, float]:
    mixture = pinned.phase(part).dataset_mixture
    return {"selection_share": mixture.selection_share, "report_share": mixture.report_share}


REPORT_PROMPTS: Stage[PinnedRecipe] = Stage(
    "report_prompts",
    build_report_prompts,
    section=_shares,
    needs=lambda pinned, part: {"conversations": (CONVERSATIONS, {"source": part["task"]})},
    libraries=("xxhash",),
)


def _section(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    asked = pinned.phase(part).dataset_mixture.decontamination
    assert asked is not None, "the stage is needed only where the recipe has the key"
    return {"tasks": pinned.recipe.tasks, **asked.model_dump(mode="json"), **_shares(pinned, part)}


def _needs(pinned: PinnedRecipe, part: Part) -> Needs:
    prompts: Needs = {f"prompts:{task}": (REPORT_PROMPTS, {"task": task}) for task in pinned.recipe.tasks}
    return {"conversations": (CONVERSATIONS, part), **prompts}


# A stage for each source: another source searches only its own rows, unless it is another task as well.
CONTAMINATION = Stage(
    "contamination",
    build_contamination,
    section=_section,
    needs=_needs,
    libraries=("numpy", "xxhash"),
    resumable=True,
)
