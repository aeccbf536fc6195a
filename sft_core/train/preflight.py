"""What a model's class tells before anything is made for it: tried on a small one, where a run starts and in a plan."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from sft_core.train.accelerator import has_gpu, unmet_demands
from sft_core.train.models.attention import KNOWS_DOCUMENTS, VARLEN, allows_varlen, choose_attention
from sft_core.train.models.model import read_config
from sft_core.train.models.router import router_loss
from sft_core.train.models.small import one_thread, small_model
from sft_core.train.probe import Isolation, check_router, class_isolation

if TYPE_CHECKING:
    from sft_core.recipe.recipe import PhaseRecipe

log = logging.getLogger(__name__)
LONG = 16_384  # tokens of a pack, from which a mask of all pairs takes 256 MiB and more


def try_class(recipe: PhaseRecipe, loader: dict[str, Any], *, here: bool = True) -> list[str]:
    """What there is to say of the model that the recipe trains and scores; nothing where all is as one expects.

    loader: PinnedRecipe.model_loader. here: this machine is the one that trains. Raises ValueError for what the class
    cannot do, and OSError or ValueError where its config cannot be read.
    """
    trust = loader["trust_remote_code"]
    config = read_config(loader["path"], loader["revision"], loader["config"], trust)
    kind, asked = config.get_text_config().model_type, recipe.model.attn_implementation
    half = recipe.training.bf16 or recipe.model.dtype == "bfloat16"
    router_loss(config, recipe.training.router_aux_loss_coef)
    _check_attention(asked, config, kind, trust)
    told = _of_device(recipe) if here else []
    on_gpu = here and torch.cuda.is_available()
    attention: str = asked
    if asked != "flash_attention_2":  # which a CPU does not run
        chosen = choose_attention(asked, config, half=half, trust_remote_code=trust)
        device = "cuda" if on_gpu else "cpu"
        found = class_isolation(config, attention=chosen, trust_remote_code=trust, half=half and on_gpu, device=device)
        if found is None:
            told.append(
                f"documents of a pack: no small model of this kind ({kind}) can be built to try whether they see each "
                "other; training and evaluation try the model itself"
            )
        elif found.told_by is None:
            told.append(
                f"documents of a pack see each other in this model ({kind}, {found.attention}), so each is trained and "
                "scored in a forward of its own: right, and slower"
            )
        if found is not None:
            _check_router(config, chosen, found, recipe.training.router_aux_loss_coef, trust)
        attention = chosen or (found.attention if found is not None else "sdpa")
    if attention not in (*KNOWS_DOCUMENTS, "flex_attention") and recipe.packing.max_length > LONG:
        told += _of_long_mask(recipe, config, attention, half=half, trust=trust, here=here)
    return told


def _check_router(
    config: Any, attention: str | None, isolation: Isolation, coefficient: float | None, trust: bool
) -> None:
    """Raises ValueError where the router's loss of a small model of the class is not what the model computes of it."""
    model = small_model(config, attention=attention, trust_remote_code=trust)
    router = None if model is None else router_loss(model.config, coefficient)  # it has fewer experts a token
    if router is not None:
        with one_thread():
            check_router(model, router, isolation.forward, device="cpu")


def _of_long_mask(
    recipe: PhaseRecipe, config: Any, attention: str, *, half: bool, trust: bool, here: bool
) -> list[str]:
    """What a mask of all pairs of tokens takes, and what does without it; nothing where the GPU to come has none."""
    is_auto, length = recipe.model.attn_implementation == "auto", recipe.packing.max_length
    if not allows_varlen(config, trust):
        advice = "attention that knows the documents (varlen) does not compute this model"
    elif is_auto and half:
        if not here:
            return []
        advice = "On a GPU attention knows the documents instead (varlen)"
    else:
        keys = [
            *([] if is_auto else ["model.attn_implementation: auto"]),
            *([] if half else ["training.bf16: true"]),
        ]
        lets = "lets" if len(keys) == 1 else "let"
        advice = f"On a GPU {' and '.join(keys)} {lets} attention know the documents instead (varlen)"
    size, layers = length**2 * (2 if half else 4), config.get_text_config().num_hidden_layers
    return [
        f"packing.max_length {length}: {attention} attention builds a mask of {length} x {length}, "
        f"{size / 2**30:.1f} GiB, and each of {layers} layers keeps one for the backward pass. {advice}"
    ]


def _check_attention(asked: str, config: Any, kind: str, trust: bool) -> None:
    """Raises ValueError for attention that the class does not run with, where a small model shows it."""
    if asked in ("auto", "flash_attention_2") or small_model(config, attention=None, trust_remote_code=trust) is None:
        return
    runs = (
        allows_varlen(config, trust)
        if asked == VARLEN
        else small_model(config, attention=asked, trust_remote_code=trust) is not None
    )
    if not runs:
        raise ValueError(
            f"model.attn_implementation: found {asked!r}, with which a {kind} model does not run; auto takes what it "
            "runs with"
        )


def _of_device(recipe: PhaseRecipe) -> list[str]:
    """Raises ValueError where the recipe demands a GPU and torch sees none."""
    sees_gpu = torch.cuda.is_available()
    if unmet := unmet_demands(recipe, on_gpu=sees_gpu):
        raise ValueError(unmet)
    if has_gpu() and not sees_gpu:
        return [
            f"this machine has a GPU, and torch {torch.__version__} sees none, so all runs on the CPU; is it a build "
            "for CPUs, or the driver too old?"
        ]
    return []
