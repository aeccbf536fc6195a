"""download: a source's raw rows as canonical conversations; bad rows are rejected and counted."""

from typing import Any

from sft_core.data.sources.read import build_conversations
from sft_core.data.sources.registry import reader_module, source_of
from sft_core.pins.pinned import PinnedRecipe
from sft_core.store.stage import Part, Stage


def _section(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    dataset = pinned.recipe.dataset(part["source"])
    of_all_kinds = {
        "columns": list(dataset.columns) if dataset.columns else None,
        "format": dataset.format,
        "pin": pinned.source_pin(part["source"]),
        "limit": pinned.recipe.limit,
        "max_rejected_share": pinned.phase(part).dataset_mixture.max_rejected_share,
    }
    identity = source_of(dataset).identity()
    assert not identity.keys() & {*of_all_kinds, "source"}, f"{dataset.kind()}: its identity has a key that all have"
    return {**identity, **of_all_kinds}


# `modules` names the source's module, which the builder does not import: so a new kind of source changes no key of the
# other kinds.
CONVERSATIONS = Stage(
    "conversations",
    build_conversations,
    section=_section,
    loaders=lambda pinned, part: {"source": source_of(pinned.recipe.dataset(part["source"]))},
    modules=lambda pinned, part: (reader_module(pinned.recipe.dataset(part["source"])),),
)
