"""decontaminate: which training rows hold a prompt that the model is scored on. Off unless the recipe asks for it."""

from typing import Any

from sft_core.data.overlap.decontamination import build_contamination
from sft_core.data.overlap.report_prompts import build_report_prompts
from sft_core.pins import PinnedRecipe
from sft_core.store.ref import Ref
from sft_core.store.stage import Needs, Part, Stage
from sft_core.store.store import Store
from steps.cards import heading, table
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


# A stage for each source: one more searches only its own rows, unless it is one more task as well.
CONTAMINATION = Stage(
    "contamination",
    build_contamination,
    section=_section,
    needs=_needs,
    libraries=("numpy", "xxhash"),
    resumable=True,
)


def card(store: Store, refs: dict[str, Ref]) -> list[Any]:
    """Which source holds which task's prompts, and some of the rows. refs: of each source."""
    counts = {source: store.manifest(ref)["counts"] for source, ref in refs.items()}
    held = [(source, task, rows) for source, one in counts.items() for task, rows in one["tasks"].items()]
    if not held:
        return [heading("Contaminated rows: none")]
    examples = []
    for source, found in counts.items():
        for one in found["examples"]:
            row, prompt = f"{source} {one['row_id'][:12]}", f"{one['task']} {one['report_row_id'][:12]}"
            told = f"{row} holds {one['coverage']:.2f} of {prompt}"
            examples.append((told, one["text"], one["prompt"], one["ngram"]))
    num_rows = sum(one["contaminated"] for one in counts.values())
    return [
        heading(f"Contaminated: {num_rows} conversations of {sum(one['rows'] for one in counts.values())}"),
        table(("left out of", "holds prompts of", "conversations"), held),
        heading("Some contaminated rows"),
        table(("left out", "its text", "the prompt", "in both"), examples[:12]),
    ]
