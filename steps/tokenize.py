"""tokenize: rendered rows as Arrow shards of ids and a trained mask. Its card tells of the whole branch."""

from typing import Any

from sft_core.data.tokens import build_tokens
from sft_core.store import Ref, Stage, Store
from steps.cards import facts, rejects, sample_row
from steps.download import CONVERSATIONS
from steps.render import RENDERED, how_rendered, loaders

_PROOF = "{rows:,} rows and {turns:,} turns hold; {prompts:,} served prompts, {forms:,} forms"
_SPLIT = "{conversations_split:,}: {rows_added:,} rows more, {duplicated_tokens:,} tokens of context repeated"
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
    tokens = store.manifest(ref)
    rendered = store.manifest(Ref(*tokens["inputs"]["rendered"]))["counts"]
    download = store.manifest(Ref(*tokens["inputs"]["conversations"]))["counts"]
    counts = tokens["counts"]
    refused = sum(rendered["rejected"].values())
    return {
        "conversations": download["conversations"],
        "rejected": sum(download["rejected"].values()) + refused,
        **{name: counts["proof"].get(name, 0) for name in ("rows", "turns", "prompts", "forms")},
        "tokens": counts["tokens"],
        "trained_tokens": counts["trained_tokens"],
        "trained_share": counts["trained_tokens"] / counts["tokens"],
        "conversations_split": rendered["conversations_split"],
        "rows_added": counts["rows"] - (rendered["conversations"] - refused),
        "duplicated_tokens": counts["duplicated_tokens"],
        "control_tokens_kept_as_text": rendered["control_tokens_kept_as_text"],
    }


def card(store: Store, ref: Ref) -> list[Any]:
    """What became of the source's rows, and one of them with its trained part marked."""
    tokens = store.manifest(ref)
    rendered_ref = Ref(*tokens["inputs"]["rendered"])
    rendered = store.manifest(rendered_ref)
    download = store.manifest(Ref(*rendered["inputs"]["conversations"]))
    counts = proved(store, ref)
    return [
        *facts(
            f"Source {tokens['identity']['part']['source']}",
            {
                "rows read": download["counts"]["rows"],
                "conversations kept": counts["conversations"],
                "training rows": tokens["counts"]["rows"],
                "tokens": counts["tokens"],
                "trained tokens": f"{counts['trained_tokens']:,} ({counts['trained_share']:.1%})",
                "mask proof": _PROOF.format(**counts),
                "conversations in several rows": _SPLIT.format(**counts),
                "control tokens kept as text": counts["control_tokens_kept_as_text"],
                "revision or digest": download["identity"]["section"]["pin"],
            },
        ),
        *rejects({"download": download["counts"]["rejected"], "render": rendered["counts"]["rejected"]}),
        *sample_row(store.path(rendered_ref)),
    ]
