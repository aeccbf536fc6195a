"""A row as the model sees it, token by token, in colour."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from sft_core.data.shards import TokenShards
from sft_core.data.tokenizer import control_tokens, load_tokenizer
from sft_core.pins import pin
from sft_core.recipe import load_recipe
from sft_core.store import Store
from steps.tokenize import TOKENS

TRAINED, MASKED, CONTROL = "green", "dim", "reverse"


def show_row(recipe: str, source: str, row: int, overrides: tuple[str, ...], limit: int | None) -> None:
    """Prints one row. Raises ValueError for an unknown source or row."""
    loaded = load_recipe(recipe, overrides=overrides, limit=limit)
    if source not in loaded.sources:
        raise ValueError(f"--source: found {source!r}; the recipe's sources are {', '.join(loaded.sources)}")
    pinned = pin(loaded)
    store = Store(loaded.runtime.store)
    shards = TokenShards(store.path(store.ensure(TOKENS, pinned, source=source)))
    if not 0 <= row < len(shards):
        raise ValueError(f"--row: found {row}; {source} has rows 0 to {len(shards) - 1}")
    tokenizer = load_tokenizer(**pinned.tokenizer_loader)
    control = set(control_tokens(tokenizer).values())
    found = shards[row]
    text = Text()
    ids, trained = found.input_ids.tolist(), found.trained.tolist()
    start = 0
    while start < len(ids):
        # Some characters take several tokens: show as many as make whole text.
        end = start + 1
        while end < len(ids) and end - start < 8 and "\ufffd" in tokenizer.decode(ids[start:end]):
            end += 1
        style = TRAINED if trained[start] else MASKED
        text.append(str(tokenizer.decode(ids[start:end])), f"{style} {CONTROL}" if ids[start] in control else style)
        start = end
    console = Console(highlight=False, soft_wrap=True)
    console.print(text)
    legend = Text.assemble(("trained", TRAINED), " ", ("masked", MASKED), " ", ("control token", CONTROL))
    console.print(Text(f"\n{source} row {row}: {len(ids)} tokens, {sum(trained)} trained   "), legend, sep="", end="\n")
