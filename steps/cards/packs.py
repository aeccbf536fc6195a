"""The card of pack: the fill of the packs, and their documents."""

from __future__ import annotations

from typing import Any

from sft_core.data.packing.pack_counts import PackCounts
from sft_core.report.plots import fills, histogram
from sft_core.store.ref import Ref
from sft_core.store.store import Store
from steps.cards.pieces import bins, chart, facts, heading, table


def card(store: Store, ref: Ref) -> list[Any]:
    counts = PackCounts.from_json(store.manifest(ref)["counts"])
    changed = {
        "dropped": counts.dropped,
        "truncated": counts.truncated,
        "split": counts.split,
        "windows": counts.windows,
    }
    shown = {
        "packs": counts.packs,
        "documents": counts.documents,
        "documents a pack": f"{counts.documents / counts.packs:.1f}",
        "tokens": counts.tokens,
        "max_length": counts.max_length,
        "fill": f"{counts.fill:.2%}",
        "attention of a pack, token pairs: least, mean, most": ", ".join(
            f"{counts.attention_of_packs[name]:,}" for name in ("least", "mean", "most")
        ),
        **{f"over-long rows {name}": sum(changed[name].values()) for name in ("dropped", "truncated", "split")},
    }
    sources = sorted({source for by_source in changed.values() for source in by_source})
    rows = [(source, *(by_source.get(source, 0) for by_source in changed.values())) for source in sources]
    percents = {int(percent): packs for percent, packs in counts.packs_by_fill.items()}
    fill_title = f"tokens of a pack, percent of {counts.max_length:,} (100: full to the last token)"
    documents, lengths = bins(counts.packs_by_documents), bins(counts.documents_by_tokens)
    return [
        *facts("Packs", shown),
        *([heading("Over-long rows"), table(("source", *changed), rows)] if rows else []),
        heading("Packs by what they hold"),
        chart(fills(percents, x_title=fill_title, y_title="packs")),
        chart(histogram(documents, x_title="documents a pack", y_title="packs")),
        chart(histogram(lengths, x_title="tokens a document", y_title="documents")),
    ]
