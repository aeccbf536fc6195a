"""download: a source's raw rows as canonical conversations; bad rows are put aside and counted."""

from sft_core.data.sources import build_conversations
from sft_core.pins import PinnedRecipe
from sft_core.store.stage import Part, Stage


def _section(pinned: PinnedRecipe, part: Part) -> dict:
    dataset = pinned.recipe.dataset(part["source"])
    return {
        "id": dataset.id,
        "config": dataset.config,
        "split": dataset.split,
        "columns": list(dataset.columns) if dataset.columns else None,
        "format": dataset.format,
        "pin": pinned.source_pin(part["source"]),
        "limit": pinned.recipe.limit,
        "max_rejected_share": pinned.recipe.dataset_mixture.max_rejected_share,
    }


CONVERSATIONS = Stage(
    "conversations",
    build_conversations,
    section=_section,
    places=lambda pinned, part: {"paths": list(pinned.recipe.dataset(part["source"]).paths)},
)
