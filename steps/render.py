"""render: conversations as text by the chat template, with the spans that are trained."""

from sft_core.data.rendering import build_rendered
from sft_core.pins import PinnedRecipe
from sft_core.store import Part, Stage
from steps.download import CONVERSATIONS


def _section(pinned: PinnedRecipe, part: Part) -> dict:
    return {
        "tokenizer": pinned.tokenizer_identity,
        "template": pinned.template_identity,
        "loss_scope": pinned.recipe.training.loss_scope,
        "max_rejected_share": pinned.recipe.dataset_mixture.max_rejected_share,
    }


RENDERED = Stage(
    "rendered",
    build_rendered,
    section=_section,
    places=lambda pinned, part: {"tokenizer": pinned.tokenizer_loader, "template": pinned.template_arguments},
    needs=lambda pinned, part: {"conversations": (CONVERSATIONS, part)},
    libraries=("jinja2", "tokenizers", "transformers"),
)
