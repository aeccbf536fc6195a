"""deduplicate: the training rows that repeat an earlier row. Off unless the recipe asks for it."""

from typing import Any

from sft_core.data.overlap.deduplication import build_duplicates
from sft_core.data.overlap.signatures import build_signatures
from sft_core.pins.pinned import PinnedRecipe
from sft_core.recipe.datasets.mixture import Deduplication
from sft_core.store.stage import Needs, Part, Stage
from steps.download import CONVERSATIONS
from steps.tokenize import INDEX, TOKENS


def _asked(pinned: PinnedRecipe, part: Part) -> Deduplication:
    asked = pinned.phase(part).dataset_mixture.deduplication
    assert asked is not None, "the stage is needed only where the recipe has the key"
    return asked


def _signature_section(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    asked = _asked(pinned, part)
    return {
        "ngram": asked.ngram if asked.near else None,
        "num_permutations": asked.num_permutations if asked.near else None,
    }


# Signs every conversation, in whatever split it is, so that other shares of the splits sign nothing anew.
SIGNATURES = Stage(
    "signatures",
    build_signatures,
    section=_signature_section,
    needs=lambda pinned, part: {"conversations": (CONVERSATIONS, part)},
    libraries=("datasketch", "numpy", "xxhash"),
    resumable=True,
)


def _section(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    asked, mixture = _asked(pinned, part), pinned.phase(part).dataset_mixture
    return {
        "sources": mixture.trained_sources,
        "ngram": asked.ngram if asked.near else None,
        "threshold": asked.threshold if asked.near else None,
        "selection_share": mixture.selection_share,
        "report_share": mixture.report_share,
    }


def _needs(pinned: PinnedRecipe, part: Part) -> Needs:
    needs: Needs = {}
    for source in pinned.phase(part).dataset_mixture.trained_sources:
        for stage in (CONVERSATIONS, TOKENS, SIGNATURES):
            needs[f"{stage.name}:{source}"] = (stage, {"source": source})
    return needs


DUPLICATES = Stage(
    "duplicates",
    build_duplicates,
    section=_section,
    needs=_needs,
    reads={TOKENS.name: INDEX},
    libraries=("datasketch", "numpy", "xxhash"),
)
