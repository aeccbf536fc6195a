"""A row as the model sees it, in colour."""

from __future__ import annotations

import numpy as np

from sft_core.data.proof.decoded import DecodedRows, Vocabulary
from sft_core.data.shards.token_shards import TokenShards
from sft_core.data.tokenizer.encoded import EncodedRows
from sft_core.data.tokenizer.tokenizer import load_tokenizer
from sft_core.pins.pinned import pin
from sft_core.store.store import Store
from steps.colour import legend, painted
from steps.console import TextConsole, styled
from steps.runs.recipes import read_recipe
from steps.tokenize import TOKENS


def show_row(recipe: str, source: str, row: int, overrides: tuple[str, ...], limit: int | None) -> None:
    """Prints one row. Raises ValueError for an unknown source or row."""
    loaded = read_recipe(recipe, overrides=overrides, limit=limit)
    if source not in loaded.sources:
        raise ValueError(f"--source: found {source!r}; the recipe's sources are {', '.join(loaded.sources)}")
    pinned = pin(loaded)
    store = Store(loaded.runtime.store)
    shards = TokenShards(store.path(store.ensure(TOKENS, pinned, source=source)))
    if not 0 <= row < len(shards):
        raise ValueError(f"--row: found {row}; {source} has rows 0 to {len(shards) - 1}")
    ids, trained = shards[row].input_ids, shards[row].trained
    alone = EncodedRows(ids, trained, np.array([0, len(ids)], dtype=np.int32))
    vocabulary = Vocabulary(load_tokenizer(**pinned.tokenizer_loader))
    console = TextConsole(soft_wrap=True)
    console.print(painted(DecodedRows(vocabulary, alone).pieces(0)))
    num_trained = int(np.count_nonzero(trained))
    console.print(styled(f"\n{source} row {row}: {len(ids)} tokens, {num_trained} trained   "), legend(), sep="")
