"""harness: a model on one task of the lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sft_core.evaluate.harness import build_harness
from sft_core.pins.pinned import PinnedRecipe
from sft_core.recipe.evaluation import LmEval
from sft_core.rounds import BASE
from sft_core.store.stage import Part, Section, Stage
from steps import evaluate
from steps.train import MODEL, TRAINED


def _lm_eval(pinned: PinnedRecipe) -> LmEval:
    lm_eval = pinned.recipe.evaluation.lm_eval
    assert lm_eval is not None, "a plan has this stage only for a recipe with evaluation.lm_eval"
    return lm_eval


def _template(pinned: PinnedRecipe, template: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The recipe's template with lm-eval's kwargs; None asks in plain text. template: its identity or its loader."""
    lm_eval = _lm_eval(pinned)
    if not lm_eval.apply_chat_template:
        return None
    return {**template, "kwargs": template["kwargs"] | lm_eval.chat_template_kwargs}


def _section(pinned: PinnedRecipe, part: Part) -> Section:
    recipe, lm_eval = pinned.recipe, _lm_eval(pinned)
    limits = [limit for limit in (lm_eval.limit, recipe.limit) if limit is not None]
    return {
        "model": pinned.model_identity if part["model"] == BASE else None,
        "tokenizer": pinned.tokenizer_identity,
        "template": _template(pinned, pinned.template_identity),
        "task": pinned.harness_identity(part["task"]),
        "attn_implementation": recipe.model.attn_implementation,
        **evaluate.how_loaded(pinned),
        "num_fewshot": lm_eval.num_fewshot,
        "limit": min(limits, default=None),
        "system_instruction": lm_eval.system_instruction,
        "gen_kwargs": lm_eval.gen_kwargs,
    }


def _loaders(pinned: PinnedRecipe, part: Part) -> Mapping[str, object]:
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
    loaders=_loaders,
    needs=evaluate.scored_model,
    reads={TRAINED.name: MODEL},
    version=2,
    libraries=("torch", "transformers"),
)
