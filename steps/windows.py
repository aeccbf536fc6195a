"""windows: over-long rows split at turns, if the recipe says so; each window is a row as it is served."""

from typing import Any

from sft_core.data.packing.windows import build_windows
from sft_core.pins.pinned import PinnedRecipe
from sft_core.store.stage import Part, Stage
from steps.download import CONVERSATIONS
from steps.render import RENDERED, how_rendered, loaders
from steps.tokenize import TOKENS


def _section(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    return {**how_rendered(pinned, part), "max_length": pinned.phase(part).packing.max_length}


WINDOWS = Stage(
    "windows",
    build_windows,
    section=_section,
    loaders=loaders,
    needs=lambda pinned, part: {
        "conversations": (CONVERSATIONS, part),
        "rendered": (RENDERED, part),
        "tokens": (TOKENS, part),
    },
    libraries=("jinja2", "numpy", "pyarrow", "tokenizers", "transformers"),
    resumable=True,
)
