"""render: conversations as text by the chat template, with the spans that are trained."""

from typing import Any

from sft_core.data.rendering.build import build_rendered
from sft_core.pins.pinned import PinnedRecipe
from sft_core.store.stage import Part, Stage
from steps.download import CONVERSATIONS


def how_rendered(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    """The keys that decide the text of a conversation and its trained spans."""
    return {
        "tokenizer": pinned.tokenizer_identity,
        "template": pinned.template_identity,
        "stop_tokens": list(pinned.recipe.model.stop_tokens),
        "policy": pinned.row_policy(part),
    }


def loaders(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    return {"tokenizer": pinned.tokenizer_loader, "template": pinned.template_arguments}


def _section(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    return {
        **how_rendered(pinned, part),
        "max_rejected_share": pinned.phase(part).dataset_mixture.max_rejected_share,
    }


RENDERED = Stage(
    "rendered",
    build_rendered,
    section=_section,
    loaders=loaders,
    needs=lambda pinned, part: {"conversations": (CONVERSATIONS, part)},
    libraries=("jinja2", "tokenizers", "transformers"),
    resumable=True,
)
