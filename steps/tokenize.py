"""tokenize: rendered rows as Arrow shards of ids and a trained mask. Its card tells of the whole branch."""

from typing import Any

from sft_core.data.tokens.build import build_tokens
from sft_core.store.ref import Ref
from sft_core.store.stage import Stage
from sft_core.store.store import Store
from steps.download import CONVERSATIONS
from steps.render import RENDERED, how_rendered, loaders

TOKENS = Stage(
    "tokens",
    build_tokens,
    section=how_rendered,  # the proof serves prompts anew
    places=loaders,
    needs=lambda pinned, part: {"rendered": (RENDERED, part), "conversations": (CONVERSATIONS, part)},
    libraries=("jinja2", "numpy", "pyarrow", "tokenizers", "transformers"),
    resumable=True,
)


def proved(store: Store, ref: Ref) -> dict[str, Any]:
    """What became of a source's conversations, and what of it the mask proof checked."""
    counts = store.manifest(ref)["counts"]
    source = counts["source"]
    refused = sum(source["rejected"]["render"].values())
    return {
        "conversations": source["conversations"],
        "rejected": sum(sum(reasons.values()) for reasons in source["rejected"].values()),
        **{name: counts["proof"].get(name, 0) for name in ("rows", "turns", "prompts", "forms")},
        "tokens": counts["tokens"],
        "trained_tokens": counts["trained_tokens"],
        "trained_share": counts["trained_tokens"] / counts["tokens"],
        "conversations_split": source["conversations_split"],
        "rows_added": counts["rows"] - (source["conversations"] - refused),
        "duplicated_tokens": counts["duplicated_tokens"],
        "control_tokens_kept_as_text": source["control_tokens_kept_as_text"],
    }
