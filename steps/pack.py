"""pack: rows into packs of at most max_length tokens, first-fit-decreasing over the whole mixture."""

from typing import Any

from sft_core.data.over_long import windows_of
from sft_core.data.packing import build_packs
from sft_core.pins import PinnedRecipe
from sft_core.report.plots import fills, histogram
from sft_core.store.ref import Ref
from sft_core.store.stage import Needs, Part, Stage
from sft_core.store.store import Store
from steps.cards import bins, chart, facts, heading, table
from steps.mix import MIXTURE
from steps.tokenize import TOKENS
from steps.windows import WINDOWS


def _section(pinned: PinnedRecipe, part: Part) -> dict:
    phase = pinned.phase(part)
    packing, search = phase.packing, phase.search
    by_source = {"by_source": True} if search is not None and search.needs.packs_by_source else {}
    return by_source | {
        "sources": phase.sources,
        "packing_strategy": packing.packing_strategy,
        "max_length": packing.max_length,
        "over_long": packing.over_long,
        "loss_scope": phase.training.loss_scope,
    }


def rows_to_pack(pinned: PinnedRecipe, part: Part) -> Needs:
    """The outputs that hold the rows of a plan: each source's tokens, and its windows where rows are split."""
    phase = pinned.phase(part)
    needs: Needs = {source: (TOKENS, {"source": source}) for source in phase.sources}
    if phase.packing.over_long == "split":
        needs |= {windows_of(source): (WINDOWS, {"source": source}) for source in phase.sources}
    return needs


def _needs(pinned: PinnedRecipe, part: Part) -> Needs:
    return {"mixture": (MIXTURE, part), **rows_to_pack(pinned, part)}


PACKED = Stage("packed", build_packs, section=_section, needs=_needs)


def card(store: Store, ref: Ref) -> list[Any]:
    counts = store.manifest(ref)["counts"]
    changed = {name: counts[name] for name in ("dropped", "truncated", "split", "windows")}
    shown = {
        "packs": counts["packs"],
        "documents": counts["documents"],
        "documents a pack": f"{counts['documents'] / counts['packs']:.1f}",
        "tokens": counts["tokens"],
        "max_length": counts["max_length"],
        "fill": f"{counts['fill']:.2%}",
        "attention of a pack, token pairs: least, mean, most": ", ".join(
            f"{counts['attention_of_packs'][name]:,}" for name in ("least", "mean", "most")
        ),
        **{f"over-long rows {name}": sum(changed[name].values()) for name in ("dropped", "truncated", "split")},
    }
    sources = sorted({source for by_source in changed.values() for source in by_source})
    rows = [(source, *(by_source.get(source, 0) for by_source in changed.values())) for source in sources]
    percents = {int(percent): packs for percent, packs in counts["packs_by_fill"].items()}
    fill_title = f"tokens of a pack, percent of {counts['max_length']:,} (100: full to the last token)"
    documents, lengths = bins(counts["packs_by_documents"]), bins(counts["documents_by_tokens"])
    return [
        *facts("Packs", shown),
        *([heading("Over-long rows"), table(("source", *changed), rows)] if rows else []),
        heading("Packs by what they hold"),
        chart(fills(percents, x_title=fill_title, y_title="packs")),
        chart(histogram(documents, x_title="documents a pack", y_title="packs")),
        chart(histogram(lengths, x_title="tokens a document", y_title="documents")),
    ]
