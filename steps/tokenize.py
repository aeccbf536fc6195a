"""tokenize: rendered rows as Arrow shards of ids and a trained mask. Its card tells of the whole branch."""

from typing import Any

from sft_core.data.tokens import build_tokens
from sft_core.report.plots import histogram
from sft_core.store.ref import Ref
from sft_core.store.stage import Stage
from sft_core.store.store import Store
from steps.cards import bins, chart, facts, heading, rejects, sample
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


def card(store: Store, ref: Ref) -> list[Any]:
    """What became of the source's rows, how long they are, and one of them with its trained part marked."""
    manifest = store.manifest(ref)
    told, counts, name = manifest["counts"], proved(store, ref), manifest["identity"]["part"]["source"]
    untrained = told["rows_by_trained_tokens"].get("0", 0)
    return [
        *facts(
            f"Source {name}",
            {
                "rows read": told["source"]["rows"],
                "conversations kept": counts["conversations"],
                "training rows": told["rows"],
                **({"rows that train nothing": untrained} if untrained else {}),
                "tokens": counts["tokens"],
                "trained tokens": f"{counts['trained_tokens']:,} ({counts['trained_share']:.1%})",
                "mask proof": _PROOF.format(**counts),
                "conversations in several rows": _SPLIT.format(**counts),
                "control tokens kept as text": counts["control_tokens_kept_as_text"],
                "revision or digest": told["source"]["pin"],
            },
        ),
        *rejects({name: told["source"]["rejected"]}),
        heading("Lengths"),
        *_lengths(told["rows_by_tokens"], "tokens a row"),
        *_lengths(told["rows_by_trained_tokens"], "trained tokens a row"),
        *sample(told["sample"]),
    ]


def _lengths(counts: dict[str, int], title: str) -> list[Any]:
    found = bins(counts)
    return [chart(histogram(found, x_title=title, y_title="rows"))] if found else []
