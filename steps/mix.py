"""mix: which rows of which source are trained on, by weight. Cheap: a new weight re-tokenizes nothing."""

from typing import Any

from sft_core.data.mixture import build_mixture
from sft_core.pins import PinnedRecipe
from sft_core.report.plots import bars
from sft_core.store import Part, Ref, Stage, Store
from steps.cards import chart, facts, table
from steps.tokenize import TOKENS


def _section(pinned: PinnedRecipe, part: Part) -> dict:
    mixture = pinned.recipe.dataset_mixture
    return {
        "sources": [
            {"name": dataset.source, "weight": dataset.weight, "num_rows": dataset.num_rows}
            for dataset in mixture.datasets
        ],
        "selection_share": mixture.selection_share,
        "report_share": mixture.report_share,
        "seed": mixture.seed,
    }


MIXTURE = Stage(
    "mixture",
    build_mixture,
    section=_section,
    needs=lambda pinned, part: {source: (TOKENS, {"source": source}) for source in pinned.recipe.sources},
)


def card(store: Store, ref: Ref) -> list[Any]:
    counts = store.manifest(ref)["counts"]
    columns = ("train", "selection", "report", "weight", "kept", "tokens", "trained_tokens")
    sources = counts["sources"]
    return [
        *facts("Mixture", {"rows": counts["rows"], "tokens": counts["tokens"], "sources": len(sources)}),
        table(("source", *columns), [(name, *(row[column] for column in columns)) for name, row in sources.items()]),
        chart(bars({name: row["trained_tokens"] for name, row in sources.items()}, x_title="trained tokens")),
    ]
