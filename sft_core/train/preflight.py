"""Checks of a model's class by a small model of it, at the start of a run and in a plan, before any work is done."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sft_core.recipe.wording import alternatives
from sft_core.train.models.attention import KNOWS_DOCUMENTS, VARLEN, allows_varlen, choose_attention
from sft_core.train.models.model import read_config
from sft_core.train.models.router import router_loss
from sft_core.train.models.small import one_thread, small_model
from sft_core.train.probe import Isolation, check_router, class_isolation

if TYPE_CHECKING:
    from sft_core.recipe.recipe import PhaseRecipe

log = logging.getLogger(__name__)
LONG = 16_384  # tokens of a pack; from here on a mask of all pairs takes at least 256 MiB


class ClassTrial(NamedTuple):
    """attention: what the recipe's choice is for the class. documents_alone: each document gets its own forward."""

    attention: str
    documents_alone: bool
    warnings: list[str]


def try_class(recipe: PhaseRecipe, loader: Mapping[str, Any], *, here: bool = True) -> ClassTrial:
    """How the class of the model that the recipe trains and scores runs, and warnings about it.

    loader: PinnedRecipe.model_loader. here: this machine trains. Raises ValueError if the class cannot run as the
    recipe asks, and OSError or ValueError if the model's config cannot be read.
    """
    trust = loader["trust_remote_code"]
    config = read_config(loader["path"], loader["revision"], loader["config"], trust)
    kind, asked = config.get_text_config().model_type, recipe.model.attn_implementation
    half = recipe.training.bf16 or recipe.model.dtype == "bfloat16"
    router_loss(config, recipe.training.router_aux_loss_coef)
    _check_attention(asked, config, kind, trust)
    warnings: list[str] = []
    on_gpu = here and torch.cuda.is_available()
    attention: str = asked
    isolation: Isolation | None = None
    if asked != "flash_attention_2":  # which a CPU does not run
        chosen = choose_attention(asked, config, half=half, trust_remote_code=trust)
        device = "cuda" if on_gpu else "cpu"
        isolation = class_isolation(
            config, attention=chosen, trust_remote_code=trust, half=half and on_gpu, device=device
        )
        if isolation is None:
            warnings.append(
                f"documents of a pack: no small {kind} model can be built to test whether they see each other; "
                "training and evaluation test the model itself"
            )
        elif isolation.document_inputs is None:
            warnings.append(
                f"documents of a pack see each other in this model ({kind}, {isolation.attention}), so each is trained "
                "and scored in its own forward, which is correct and slower"
            )
        if isolation is not None:
            _check_router(config, chosen, isolation, recipe.training.router_aux_loss_coef, trust)
        attention = chosen or (isolation.attention if isolation is not None else "sdpa")
    if attention not in (*KNOWS_DOCUMENTS, "flex_attention") and recipe.packing.max_length > LONG:
        warnings += _of_long_mask(recipe, config, attention, half=half, trust=trust, here=here)
    return ClassTrial(attention, isolation is not None and isolation.document_inputs is None, warnings)


def _check_router(
    config: Any, attention: str | None, isolation: Isolation, coefficient: float | None, trust: bool
) -> None:
    """Raises ValueError if the router's loss of a small model of the class differs from the model's."""
    model = small_model(config, attention=attention, trust_remote_code=trust)
    router = (
        None if model is None else router_loss(model.config, coefficient)
    )  # the small model uses fewer experts per token
    if router is not None:
        with one_thread():
            check_router(model, router, isolation.forward, device="cpu")


def _of_long_mask(
    recipe: PhaseRecipe, config: Any, attention: str, *, half: bool, trust: bool, here: bool
) -> list[str]:
    """A warning about the memory of a mask of all pairs of tokens; none if training will run varlen on a GPU."""
    is_auto, length = recipe.model.attn_implementation == "auto", recipe.packing.max_length
    if not allows_varlen(config, trust):
        advice = "varlen attention, which needs no mask, does not compute this model"
    elif is_auto and half:
        if not here:
            return []
        advice = "On a GPU varlen attention, which needs no mask, takes its place"
    else:
        keys = [
            *([] if is_auto else ["model.attn_implementation: auto"]),
            *([] if half else ["training.bf16: true"]),
        ]
        advice = f"Set {' and '.join(keys)}: then varlen attention, which needs no mask, takes its place on a GPU"
    size, layers = length**2 * (2 if half else 4), config.get_text_config().num_hidden_layers
    return [
        f"packing.max_length {length}: {attention} attention builds a mask of {length} x {length}, "
        f"{size / 2**30:.1f} GiB, and each of {layers} layers keeps one for the backward pass. {advice}"
    ]


def _check_attention(asked: str, config: Any, kind: str, trust: bool) -> None:
    """Raises ValueError if a small model of the class does not run with the recipe's attention."""
    if asked in ("auto", "flash_attention_2") or small_model(config, attention=None, trust_remote_code=trust) is None:
        return
    if not _runs_with(asked, config, trust):
        others = [name for name in ("sdpa", "eager", VARLEN) if name != asked and _runs_with(name, config, trust)]
        raise ValueError(
            f"model.attn_implementation: found {asked!r}, with which a {kind} model does not run; it runs with "
            f"{alternatives(others) if others else 'none of ours'}: set auto, which chooses one that runs"
        )


def _runs_with(attention: str, config: Any, trust: bool) -> bool:
    if attention == VARLEN:
        return allows_varlen(config, trust)
    return small_model(config, attention=attention, trust_remote_code=trust) is not None
