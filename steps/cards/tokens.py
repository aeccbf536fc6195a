"""The card of tokenize: what became of a source's rows, their lengths, and one row with its mask."""

from __future__ import annotations

import dataclasses
from typing import Any

from sft_core.data.tokens.token_counts import TokenCounts
from sft_core.report.plots import histogram
from sft_core.store.ref import Ref
from sft_core.store.store import Store
from steps.cards.pieces import bins, chart, facts, heading, rejects, sample
from steps.tokenize import proved

_PROOF = "{rows:,} rows and {turns:,} turns hold; {prompts:,} served prompts, {forms:,} forms"
_SPLIT = "{conversations_split:,}: {rows_added:,} rows more, {duplicated_tokens:,} tokens of context repeated"


def card(store: Store, ref: Ref) -> list[Any]:
    """What became of the source's rows, their lengths, and one row with its trained part marked."""
    manifest = store.manifest(ref)
    name = manifest["identity"]["part"]["source"]
    counts, proof = TokenCounts.from_json(manifest["counts"]), proved(store, ref)
    num_untrained = counts.rows_by_trained_tokens.get("0", 0)
    numbers = dataclasses.asdict(proof)
    return [
        *facts(
            f"Source {name}",
            {
                "rows read": counts.source.rows,
                "conversations kept": proof.conversations,
                "training rows": counts.rows,
                **({"rows that train nothing": num_untrained} if num_untrained else {}),
                "tokens": proof.tokens,
                "trained tokens": f"{proof.trained_tokens:,} ({proof.trained_share:.1%})",
                "mask proof": _PROOF.format(**numbers),
                "conversations in several rows": _SPLIT.format(**numbers),
                "control tokens kept as text": proof.control_tokens_kept_as_text,
                "revision or digest": counts.source.pin,
            },
        ),
        *rejects({name: counts.source.rejected}),
        heading("Lengths"),
        *_lengths(counts.rows_by_tokens, "tokens a row"),
        *_lengths(counts.rows_by_trained_tokens, "trained tokens a row"),
        *sample(counts.sample),
    ]


def _lengths(counts: dict[str, int], title: str) -> list[Any]:
    lengths = bins(counts)
    return [chart(histogram(lengths, x_title=title, y_title="rows"))] if lengths else []
