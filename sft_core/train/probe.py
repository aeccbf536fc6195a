"""Tried on the model at hand, before anything is trained or scored: do documents of a pack see each other?

Many architectures keep packed documents apart when they are told where each begins, and many do not, without a word.
So no list of names decides. Two documents are packed, and the first is exchanged: the second must not notice.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from sft_core.data.shards.token_shards import TokenRow
from sft_core.train.collate import Batch, DocumentInputs, collate, model_inputs, to_device
from sft_core.train.loss import Forward, trained_losses, trained_token_logits, trained_token_nll
from sft_core.train.models.attention import KNOWS_DOCUMENTS
from sft_core.train.models.router import RouterLoss
from sft_core.train.models.small import one_thread, small_model

log = logging.getLogger(__name__)
DOCUMENT = 300  # tokens: more than the chunks in which recurrent layers compute
SMALL_DOCUMENT = 100  # of a small model, whose chunks are cut as well
EXACT = 1e-4  # of the logits' norm: what fp32 rounds, at most
STANDS_OUT = 10.0  # times: by how much documents that do see each other differ more than rounding does
# What a neighbour's other tokens may change by rounding alone: 2.5 times bfloat16's own. A tenth of a planted leak is
# no bound by itself: where that is 1.2, a leak of 0.12 would pass. Packed beside alone has no such bound, for kernels
# round two lengths otherwise by more: 0.015 of the logits with experts in bfloat16.
ROUNDING = 1e-2


@dataclasses.dataclass(frozen=True)
class Trial:
    """How a model was told where documents begin, and what came of it, as shares of the second document's logits.

    exchanged: how much they change with the first document. alone: how they differ from those of the document by
    itself. planted: how much more the two differ as one document, which is what a leak looks like. gradient: the
    largest of the second document's by the first one's embeddings; None where that was not asked.
    """

    told_by: DocumentInputs
    exchanged: float
    alone: float
    planted: float
    gradient: float | None = None

    def isolates(self, *, exact: bool, class_does: bool | None) -> bool:
        """exact: in fp32 throughout. class_does: whether a small model of the class isolates so; None: not known.

        Kernels that group tokens (experts) or split sums by the batch round otherwise when a neighbour changes. So what
        is not equal to the bit counts where a gradient of exactly 0, here or of the class, says that nothing gets
        through but rounding.
        """
        bound = EXACT if exact else self.planted / STANDS_OUT
        if self.alone > bound or self.exchanged > min(bound, ROUNDING):
            return False
        if self.gradient is not None:
            return self.gradient == 0
        return self.exchanged == 0 or class_does is True

    def __str__(self) -> str:
        return (
            f"told by {self.told_by}: exchanged {self.exchanged:.2g}, packed beside alone {self.alone:.2g}, "
            f"a planted leak {self.planted:.2g}"
        )


@dataclasses.dataclass(frozen=True)
class Isolation:
    """told_by: how the model keeps documents apart; None: it does not, so each gets a forward of its own. attention:
    the implementation with which that was tried."""

    told_by: DocumentInputs | None
    attention: str
    evidence: str

    @property
    def forward(self) -> Forward:
        return Forward(self.told_by or candidates(self.attention)[0], alone=self.told_by is None)


def candidates(attention: str) -> tuple[DocumentInputs, ...]:
    """How a model may be told where documents begin, the cheapest first."""
    return ("bounds", "sequences") if attention in KNOWS_DOCUMENTS else ("positions", "sequences")


def class_isolation(
    config: Any, *, attention: str | None, trust_remote_code: bool, half: bool = False, device: str = "cpu"
) -> Isolation | None:
    """Whether a small model of the config's class isolates; None where none can be built.

    half: under bfloat16 autocast, as kernels on a GPU want it. The same config is asked once in a process.
    """
    settings = json.dumps(config.to_dict(), sort_keys=True, default=str)
    key = (type(config), settings, attention, trust_remote_code, half, device)
    if key not in _KNOWN:
        with one_thread():
            _KNOWN[key] = _class_isolation(config, attention, trust_remote_code, half, device)
    return _KNOWN[key]


_KNOWN: dict[Any, Isolation | None] = {}


def _class_isolation(
    config: Any, attention: str | None, trust_remote_code: bool, half: bool, device: str
) -> Isolation | None:
    model = small_model(config, attention=attention, trust_remote_code=trust_remote_code)
    if model is None:
        return None
    model.to(device)
    evidence, attention = [], model.config._attn_implementation
    for told_by in candidates(attention):
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
            trial = try_candidate(model, told_by, device=device, length=SMALL_DOCUMENT, with_gradient=True)
        evidence.append(str(trial))
        if isinstance(trial, Trial) and trial.isolates(exact=not half, class_does=None):
            return Isolation(told_by, attention, str(trial))
    return Isolation(None, attention, "; ".join(evidence))


def model_isolation(model: Any, of_class: Isolation | None, *, attention: str, device: Any, exact: bool) -> Isolation:
    """Whether this model isolates, with its own weights, kernels and precision. On all ranks that share it together.

    of_class: what class_isolation found. exact: it computes in fp32.
    """
    if of_class is not None and of_class.told_by is None:
        return of_class
    evidence = []
    for told_by in candidates(attention):
        trial = try_candidate(model, told_by, device=device)
        evidence.append(str(trial))
        class_does = of_class is not None and of_class.told_by == told_by
        if isinstance(trial, Trial) and trial.isolates(exact=exact, class_does=class_does):
            return Isolation(told_by, attention, str(trial))
    return Isolation(None, attention, "; ".join(evidence))


def settle(
    model: Any,
    of_class: Isolation | None,
    *,
    attention: str,
    device: Any,
    exact: bool,
    may_fuse_head: bool,
    router: RouterLoss | None,
) -> tuple[Forward, Isolation]:
    """How this model is to be run, and why; the first rank's answer, on all ranks together.

    Raises ValueError where the router's loss cannot be computed as the model computes it.
    """
    isolation = model_isolation(model, of_class, attention=attention, device=device, exact=exact)
    forward = isolation.forward
    is_fused = may_fuse_head and check_head(model, forward, device=device, exact=exact)
    if may_fuse_head and not is_fused:
        log.warning("head=plain: the model does more to its logits than the tiled head knows; it takes more memory")
    if router is not None:
        check_router(model, router, forward, device=device)
    agreed: list[Any] = [dataclasses.replace(forward, fused_head=is_fused, router=router), isolation]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        broadcast_object_list(agreed)
    forward, isolation = agreed
    if isolation.told_by is None:
        log.warning(
            "documents=alone: packed, they see each other, so each gets a forward, slower (%s)", isolation.evidence
        )
    else:
        log.info("documents=together attention=%s %s", attention, isolation.evidence)
    return forward, isolation


def try_candidate(model: Any, told_by: DocumentInputs, **options: Any) -> Trial | str:
    """run_trial's answer, or why there is none: models and kernels refuse what they are told by errors of any type.

    Raises torch.OutOfMemoryError, which says nothing of the model.
    """
    try:
        return run_trial(model, told_by, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        return f"told by {told_by}: {type(error).__name__}: {reason}"


def run_trial(
    model: Any, told_by: DocumentInputs, *, device: Any, length: int = DOCUMENT, with_gradient: bool = False
) -> Trial:
    """Raises what the model raises. It is in training mode afterwards if it was before."""
    first, other, second = _documents(model, length)
    forward = Forward(told_by)
    packed, exchanged, alone, planted = (
        to_device(batch, device)
        for batch in (
            collate([first, second]),
            collate([other, second]),
            collate([second]),
            collate([_joined(first, second)]),
        )
    )
    with _evaluating(model), torch.no_grad():
        own = trained_token_logits(model, packed, forward)
        by_itself = _difference(trained_token_logits(model, alone, dataclasses.replace(forward, alone=True)), own)
        changed, leaked = (
            _difference(trained_token_logits(model, batch, forward), own) for batch in (exchanged, planted)
        )
        gradient = _gradient(model, packed, forward) if with_gradient else None
    return Trial(told_by, changed, by_itself, leaked, gradient)


def _documents(model: Any, length: int = DOCUMENT) -> list[tuple[TokenRow, int]]:
    """Three documents of random tokens, of which all but the first token are targets in the last one alone."""
    text = _config_of(model).get_text_config()
    context = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 2 * length
    length = max(2, min(length, context // 2))
    ids = np.random.default_rng(0).integers(0, text.vocab_size, (3, length)).astype(np.int32)
    return [(TokenRow(row, np.full(length, number == 2, np.uint8)), 0) for number, row in enumerate(ids)]


def _joined(first: tuple[TokenRow, int], second: tuple[TokenRow, int]) -> tuple[TokenRow, int]:
    ids, trained = (
        np.concatenate([getattr(row, name) for row, _ in (first, second)]) for name in ("input_ids", "trained")
    )
    trained[len(first[0].trained)] = 0  # as the first token of the second document by itself
    return TokenRow(ids, trained), 0


def _difference(found_NV: torch.Tensor, expected_NV: torch.Tensor) -> float:
    """Of the norm; 0 where all is equal to the bit."""
    return float((found_NV - expected_NV).norm() / expected_NV.norm())


def _gradient(model: Any, batch: Batch, forward: Forward) -> float:
    """The largest of the second document's logits by an embedding of the first one. No weight gets one."""
    embedded: list[torch.Tensor] = []

    def cut(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # some models write into it

    handle = _unwrapped(model).get_input_embeddings().register_forward_hook(cut)
    try:
        with torch.enable_grad():
            logits_NV = trained_token_logits(model, batch, forward)
            (found,) = torch.autograd.grad(logits_NV.square().sum(), embedded[0])
    finally:
        handle.remove()
    return float(found.reshape(-1, found.shape[-1])[: int(batch["lengths"][0])].abs().max())


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _unwrapped(model: Any) -> Any:
    return getattr(model, "module", model)


def _config_of(model: Any) -> Any:
    return _unwrapped(model).config


_TRIED: weakref.WeakKeyDictionary[Any, Forward] = weakref.WeakKeyDictionary()


def forward_of(network: Any) -> Forward:
    """How a model that is loaded, whole and on its device, is run; tried on it, once."""
    if network not in _TRIED:
        half, device = network.dtype != torch.float32, network.device
        attention = network.config._attn_implementation
        # Its own code, if it has some, is trusted already: it is loaded.
        of_class = class_isolation(
            network.config, attention=attention, trust_remote_code=True, half=half, device=str(device)
        )
        exact = not half and device.type == "cpu"
        isolation = model_isolation(network, of_class, attention=attention, device=device, exact=exact)
        if isolation.told_by is None:
            log.warning("documents=alone: packed, rows see each other, so each gets a forward (%s)", isolation.evidence)
        _TRIED[network] = isolation.forward
    return _TRIED[network]


# What else is held against the model itself


def check_head(model: Any, forward: Forward, *, device: Any, exact: bool) -> bool:
    """Whether the fused head gives the likelihoods that the model's own logits give."""
    batch = to_device(collate([_documents(model)[2]]), device)
    with _evaluating(model), torch.no_grad():
        plain = trained_token_nll(model, batch, forward)
        fused = trained_token_nll(model, batch, dataclasses.replace(forward, fused_head=True))
    return float((fused - plain).norm() / plain.norm()) <= (EXACT if exact else 100 * EXACT)


def check_router(model: Any, router: RouterLoss, forward: Forward, *, device: Any) -> None:
    """Raises ValueError where the router's loss of a pack is not what the model computes of it."""
    batch = to_device(collate([_documents(model)[2]]), device)
    forward = dataclasses.replace(forward, fused_head=False, router=router)
    with _evaluating(model), torch.no_grad():
        own = model(**model_inputs(batch, forward.told_by, alone=forward.alone), output_router_logits=True).get(
            "aux_loss"
        )
        total = trained_losses(model, batch, forward).router
    assert total is not None
    found = float(total) / int(batch["lengths"].sum())
    if own is None or not math.isclose(found, float(own), rel_tol=1e-2):
        raise ValueError(
            f"training.router_aux_loss_coef: the router's loss of a {_config_of(model).model_type} model is computed "
            f"otherwise than is known here (its own {own}, {found:.6g}); set it to 0"
        )
