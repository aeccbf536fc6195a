"""tokenize: rendered rows as Arrow shards of ids and a trained mask. Its card shows the source's steps until here."""

import dataclasses

from sft_core.data.tokens.build import build_tokens
from sft_core.data.tokens.token_counts import TokenCounts
from sft_core.store.ref import Ref
from sft_core.store.stage import Stage
from sft_core.store.store import Store
from steps.download import CONVERSATIONS
from steps.render import RENDERED, how_rendered, loaders

INDEX = ("*/index.parquet",)  # the files that tell of rows without their tokens

TOKENS = Stage(
    "tokens",
    build_tokens,
    section=how_rendered,  # the proof renders served prompts anew
    loaders=loaders,
    needs=lambda pinned, part: {"rendered": (RENDERED, part), "conversations": (CONVERSATIONS, part)},
    libraries=("jinja2", "numpy", "pyarrow", "tokenizers", "transformers"),
    resumable=True,
)


@dataclasses.dataclass(frozen=True)
class Proved:
    """What became of a source's conversations, and what the mask proof checked: keys of `sft check --json`."""

    conversations: int
    rejected: int
    rows: int  # checked, as are turns, prompts and forms
    turns: int
    prompts: int
    forms: int
    tokens: int
    trained_tokens: int
    trained_share: float
    conversations_split: int
    rows_added: int
    duplicated_tokens: int
    control_tokens_kept_as_text: int


def proved(store: Store, ref: Ref) -> Proved:
    """ref: of TOKENS."""
    counts = TokenCounts.from_json(store.manifest(ref)["counts"])
    source = counts.source
    num_refused = sum(source.rejected["render"].values())
    return Proved(
        conversations=source.conversations,
        rejected=sum(sum(reasons.values()) for reasons in source.rejected.values()),
        rows=counts.proof.rows,
        turns=counts.proof.turns,
        prompts=counts.proof.prompts,
        forms=counts.proof.forms,
        tokens=counts.tokens,
        trained_tokens=counts.trained_tokens,
        trained_share=counts.trained_tokens / counts.tokens,
        conversations_split=source.conversations_split,
        rows_added=counts.rows - (source.conversations - num_refused),
        duplicated_tokens=counts.duplicated_tokens,
        control_tokens_kept_as_text=source.control_tokens_kept_as_text,
    )
