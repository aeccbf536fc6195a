"""The card of tokenize: what became of a source's rows, how long they are, and one of them with its mask."""

from __future__ import annotations

from typing import Any

from sft_core.report.plots import histogram
from sft_core.store.ref import Ref
from sft_core.store.store import Store
from steps.cards.pieces import bins, chart, facts, heading, rejects, sample
from steps.tokenize import proved

_PROOF = "{rows:,} rows and {turns:,} turns hold; {prompts:,} served prompts, {forms:,} forms"


_SPLIT = "{conversations_split:,}: {rows_added:,} rows more, {duplicated_tokens:,} tokens of context repeated"


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
