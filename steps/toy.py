"""A toy conversation in each rendering of the recipe whose rows are still to be tokenized."""

from __future__ import annotations

import json

from sft_core.data.tokens.toy import RenderingArguments, try_renderings
from sft_core.pins.pinned import PinnedRecipe
from sft_core.store.stage import Located, Unresolved
from sft_core.train.model_files import model_folder
from steps.render import how_rendered, loaders
from steps.tokenize import TOKENS


def rendering_warnings(planned: list[Located], pinned: PinnedRecipe, *, fetches: bool = True) -> list[str]:
    """Warnings of the renderings. Raises ValueError where no row could be trained, and for a tokenizer without use.

    fetches: whether a tokenizer of the hub may be downloaded. Otherwise a warning says what is not tried, and a
    tokenizer that does not load is a warning too: the run may be on another machine.
    """
    renderings: dict[str, RenderingArguments] = {}
    for located in planned:
        if located.stage is not TOKENS or located.status == "hit":
            continue
        try:
            arguments = {**how_rendered(pinned, located.part), **loaders(pinned, located.part)}
        except Unresolved:
            return []  # the plan reports the unresolved name
        if not fetches and not _use_local(arguments["tokenizer"]):
            return [
                "chat_template: not tried, since the tokenizer is not on this machine yet; `start` of a run tries it"
            ]
        renderings[json.dumps(arguments, sort_keys=True)] = arguments  # type: ignore[assignment]
    trials = try_renderings([*renderings.values()]) if renderings else []
    if errors := [trial.error for trial in trials if trial.error and (trial.loads or fetches)]:
        raise ValueError("\n".join(dict.fromkeys(errors)))
    return list(dict.fromkeys(text for trial in trials if (text := trial.error or trial.warning)))


def _use_local(tokenizer: dict[str, str | None]) -> bool:
    """Names the tokenizer's folder in place of its hub id. Returns False if this machine does not have the files."""
    if tokenizer["revision"] is not None:
        folder = model_folder(str(tokenizer["path"]), tokenizer["revision"])
        if folder is None or not any(folder.glob("tokenizer*")):
            return False
        tokenizer |= {"path": str(folder), "revision": None}
    return True
