"""tokenize: rendered rows as Arrow shards of ids and a trained mask. Its card tells of the whole branch."""

from typing import Any

from sft_core.data.tokens import build_tokens
from sft_core.store import Ref, Stage, Store
from steps.cards import facts, rejects, sample_row
from steps.render import RENDERED

TOKENS = Stage(
    "tokens",
    build_tokens,
    section=lambda pinned, part: {"tokenizer": pinned.tokenizer_identity},
    places=lambda pinned, part: {"tokenizer": pinned.tokenizer_loader},
    needs=lambda pinned, part: {"rendered": (RENDERED, part)},
    libraries=("tokenizers", "transformers"),
)


def card(store: Store, ref: Ref) -> list[Any]:
    """What became of the source's rows, and one of them with its trained part marked."""
    tokens = store.manifest(ref)
    rendered_ref = Ref(*tokens["inputs"]["rendered"])
    rendered = store.manifest(rendered_ref)
    download = store.manifest(Ref(*rendered["inputs"]["conversations"]))
    source, counts = tokens["identity"]["part"]["source"], tokens["counts"]
    return [
        *facts(
            f"Source {source}",
            {
                "rows read": download["counts"]["rows"],
                "conversations kept": download["counts"]["conversations"],
                "training rows": counts["rows"],
                "tokens": counts["tokens"],
                "trained tokens": f"{counts['trained_tokens']:,} ({counts['trained_tokens'] / counts['tokens']:.1%})",
                "control tokens kept as text": rendered["counts"]["control_tokens_kept_as_text"],
                "revision or digest": download["identity"]["section"]["pin"],
            },
        ),
        *rejects({"download": download["counts"]["rejected"], "render": rendered["counts"]["rejected"]}),
        *sample_row(store.path(rendered_ref)),
    ]
