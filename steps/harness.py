"""harness: a model on one task of the lm-evaluation-harness."""

from __future__ import annotations

from typing import Any

from sft_core.evaluate.harness import build_harness
from sft_core.pins.pinned import PinnedRecipe
from sft_core.recipe.evaluation import LmEval
from sft_core.rounds import BASE
from sft_core.store.stage import Part, Stage
from steps import evaluate


def _asked(pinned: PinnedRecipe) -> LmEval:
    lm_eval = pinned.recipe.evaluation.lm_eval
    assert lm_eval is not None, "what is to be scored is planned where the recipe says so"
    return lm_eval


def _template(pinned: PinnedRecipe, arguments: dict[str, Any]) -> dict[str, Any] | None:
    asked = _asked(pinned)
    if not asked.apply_chat_template:
        return None
    return arguments | {"kwargs": arguments["kwargs"] | asked.chat_template_kwargs}


def _section(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    recipe, asked = pinned.recipe, _asked(pinned)
    limits = [limit for limit in (asked.limit, recipe.limit) if limit is not None]
    return {
        "model": pinned.model_identity if part["model"] == BASE else None,
        "tokenizer": pinned.tokenizer_identity,
        "template": _template(pinned, pinned.template_identity),
        "task": pinned.harness_identity(part["task"]),
        "attn_implementation": recipe.model.attn_implementation,
        **evaluate.how_loaded(pinned),
        "num_fewshot": asked.num_fewshot,
        "limit": min(limits, default=None),
        "system_instruction": asked.system_instruction,
        "gen_kwargs": asked.gen_kwargs,
    }


def _places(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    return {
        "model": pinned.model_loader if part["model"] == BASE else None,
        "tokenizer": pinned.tokenizer_loader,
        "template": _template(pinned, pinned.template_arguments),
        "task": pinned.harness_loader(part["task"]),
    }


# The version stands for sft_core/evaluate/harness.py and served_lm.py: raise it when a change there changes a score.
HARNESS = Stage(
    "harness",
    build_harness,
    section=_section,
    places=_places,
    needs=evaluate.scored_model,
    version=2,
    verify_inputs=True,
)
