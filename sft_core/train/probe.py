"""Tests on the model itself, before training or scoring, whether documents of a pack see each other.

Many architectures isolate packed documents when they get the documents' bounds; many silently do not. No list of
architecture names decides: the test packs two documents, exchanges the first, and compares the second one's logits.
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
EXACT = 1e-4  # of the logits' norm: the largest rounding of fp32
STANDS_OUT = 10.0  # a leak is at least this many times larger than rounding
# The largest change by rounding when a neighbour's tokens change: 2.5 times bfloat16's rounding. A tenth of the planted
# leak alone is too loose: with a planted leak of 1.2, a leak of 0.12 would pass. `alone` has no such bound, because
# kernels round two lengths more differently: by 0.015 of the logits with experts in bfloat16.
ROUNDING = 1e-2


@dataclasses.dataclass(frozen=True)
class Trial:
    """Changes of the second document's logits in a pack of two, each relative to the logits' norm.

    document_inputs: how the model got the bounds of documents. exchanged: the change when another first document
    takes the first one's place. alone: the difference from a forward of the second document by itself. planted: the
    change when both are joined into one document, which is the size of a leak. gradient: the largest gradient of the
    second document's logits by the first one's embeddings; None: not computed.
    """

    document_inputs: DocumentInputs
    exchanged: float
    alone: float
    planted: float
    gradient: float | None = None

    def isolates(self, *, exact: bool, class_does: bool | None) -> bool:
        """Whether the documents are isolated.

        exact: the model computes in fp32 throughout. class_does: whether a small model of the class isolates documents
        with the same document_inputs; None: unknown. Kernels that group tokens (experts) or split sums by the batch
        round differently when a neighbour changes. So a difference that is not exactly 0 passes only if a gradient of
        exactly 0, of this model or of its class, shows that it is rounding.
        """
        bound = EXACT if exact else self.planted / STANDS_OUT
        if self.alone > bound or self.exchanged > min(bound, ROUNDING):
            return False
        if self.gradient is not None:
            return self.gradient == 0
        return self.exchanged == 0 or class_does is True

    def __str__(self) -> str:
        return (
            f"with {self.document_inputs}: exchanged {self.exchanged:.2g}, packed beside alone {self.alone:.2g}, "
            f"a planted leak {self.planted:.2g}"
        )


@dataclasses.dataclass(frozen=True)
class Isolation:
    """Whether a model isolates packed documents.

    document_inputs: the inputs with which it does; None: with none of them, so each document gets its own forward.
    attention: the attn_implementation of the trial. evidence: the trials' results, for the log.
    """

    document_inputs: DocumentInputs | None
    attention: str
    evidence: str

    @property
    def forward(self) -> Forward:
        return Forward(self.document_inputs or candidates(self.attention)[0], alone=self.document_inputs is None)


def candidates(attention: str) -> tuple[DocumentInputs, ...]:
    """The document_inputs to try with an attn_implementation, the cheapest first."""
    return ("bounds", "sequences") if attention in KNOWS_DOCUMENTS else ("positions", "sequences")


def class_isolation(
    config: Any, *, attention: str | None, trust_remote_code: bool, half: bool = False, device: str = "cpu"
) -> Isolation | None:
    """Whether a small model of the config's class isolates documents; None if no small model can be built.

    half: under bfloat16 autocast, which GPU kernels require. A process tries each config once.
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
    for document_inputs in candidates(attention):
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
            trial = try_candidate(model, document_inputs, device=device, length=SMALL_DOCUMENT, with_gradient=True)
        evidence.append(str(trial))
        if isinstance(trial, Trial) and trial.isolates(exact=not half, class_does=None):
            return Isolation(document_inputs, attention, str(trial))
    return Isolation(None, attention, "; ".join(evidence))


def model_isolation(model: Any, of_class: Isolation | None, *, attention: str, device: Any, exact: bool) -> Isolation:
    """Whether this model isolates documents, with its real weights, kernels and precision.

    All ranks call it together: they may share the weights. of_class: class_isolation's answer. exact: the model
    computes in fp32.
    """
    if of_class is not None and of_class.document_inputs is None:
        return of_class
    evidence = []
    for document_inputs in candidates(attention):
        trial = try_candidate(model, document_inputs, device=device)
        evidence.append(str(trial))
        class_does = of_class is not None and of_class.document_inputs == document_inputs
        if isinstance(trial, Trial) and trial.isolates(exact=exact, class_does=class_does):
            return Isolation(document_inputs, attention, str(trial))
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
    """How to run this model, and the isolation that decides it. All ranks call it together and get rank 0's answer.

    Raises ValueError if the router's loss here differs from the model's.
    """
    isolation = model_isolation(model, of_class, attention=attention, device=device, exact=exact)
    forward = isolation.forward
    is_fused = may_fuse_head and check_head(model, forward, device=device, exact=exact)
    if may_fuse_head and not is_fused:
        log.warning("head=plain: the tiled head does not compute this model's logits; the plain head takes more memory")
    if router is not None:
        check_router(model, router, forward, device=device)
    agreed: list[Any] = [dataclasses.replace(forward, fused_head=is_fused, router=router), isolation]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        broadcast_object_list(agreed)
    forward, isolation = agreed
    if isolation.document_inputs is None:
        log.warning(
            "documents=alone: packed documents see each other, so each gets its own forward: slower (%s)",
            isolation.evidence,
        )
    else:
        log.info("documents=together attention=%s %s", attention, isolation.evidence)
    return forward, isolation


def try_candidate(model: Any, document_inputs: DocumentInputs, **options: Any) -> Trial | str:
    """The result of run_trial, or its error as text: models and kernels refuse inputs by errors of any type.

    Raises torch.OutOfMemoryError, which says nothing about isolation.
    """
    try:
        return run_trial(model, document_inputs, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        return f"with {document_inputs}: {type(error).__name__}: {reason}"


def run_trial(
    model: Any, document_inputs: DocumentInputs, *, device: Any, length: int = DOCUMENT, with_gradient: bool = False
) -> Trial:
    """Compares the forwards that Trial describes. Raises the model's errors; keeps its training mode."""
    first, other, second = _documents(model, length)
    forward = Forward(document_inputs)
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
        expected = trained_token_logits(model, packed, forward)
        by_itself = _difference(trained_token_logits(model, alone, dataclasses.replace(forward, alone=True)), expected)
        changed, leaked = (
            _difference(trained_token_logits(model, batch, forward), expected) for batch in (exchanged, planted)
        )
        gradient = _gradient(model, packed, forward) if with_gradient else None
    return Trial(document_inputs, changed, by_itself, leaked, gradient)


def _documents(model: Any, length: int = DOCUMENT) -> list[tuple[TokenRow, int]]:
    """Three documents of random tokens. Only the third has targets: all its tokens but the first."""
    text = _config_of(model).get_text_config()
    context = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 2 * length
    length = max(2, min(length, context // 2))
    ids = np.random.default_rng(0).integers(0, text.vocab_size, (3, length)).astype(np.int32)
    return [(TokenRow(row, np.full(length, number == 2, np.uint8)), 0) for number, row in enumerate(ids)]


def _joined(first: tuple[TokenRow, int], second: tuple[TokenRow, int]) -> tuple[TokenRow, int]:
    ids, trained = (
        np.concatenate([getattr(row, name) for row, _ in (first, second)]) for name in ("input_ids", "trained")
    )
    trained[len(first[0].trained)] = (
        0  # nothing predicts it when the second document is alone, so its logits are not compared
    )
    return TokenRow(ids, trained), 0


def _difference(logits_NV: torch.Tensor, expected_NV: torch.Tensor) -> float:
    """The norm of the difference, relative to the expected norm; 0 if all bits are equal."""
    return float((logits_NV - expected_NV).norm() / expected_NV.norm())


def _gradient(model: Any, batch: Batch, forward: Forward) -> float:
    """The largest gradient of the second document's logits by an embedding of the first. Weights get no gradients."""
    embedded: list[torch.Tensor] = []

    def cut(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # some models write into their embeddings in place

    handle = _unwrapped(model).get_input_embeddings().register_forward_hook(cut)
    try:
        with torch.enable_grad():
            logits_NV = trained_token_logits(model, batch, forward)
            (gradient_1TH,) = torch.autograd.grad(logits_NV.square().sum(), embedded[0])
    finally:
        handle.remove()
    return float(gradient_1TH.reshape(-1, gradient_1TH.shape[-1])[: int(batch["lengths"][0])].abs().max())


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
    """How to run a model that is loaded whole on its device. Tries each model once."""
    if network not in _TRIED:
        half, device = network.dtype != torch.float32, network.device
        attention = network.config._attn_implementation
        # If the model has remote code, that code is loaded, so it is trusted already.
        of_class = class_isolation(
            network.config, attention=attention, trust_remote_code=True, half=half, device=str(device)
        )
        exact = not half and device.type == "cpu"
        isolation = model_isolation(network, of_class, attention=attention, device=device, exact=exact)
        if isolation.document_inputs is None:
            log.warning(
                "documents=alone: packed rows see each other, so each gets its own forward (%s)", isolation.evidence
            )
        _TRIED[network] = isolation.forward
    return _TRIED[network]


# Checks of the fused head and the router's loss against the model


def check_head(model: Any, forward: Forward, *, device: Any, exact: bool) -> bool:
    """Whether the fused head gives the same likelihoods as the model's logits."""
    batch = to_device(collate([_documents(model)[2]]), device)
    with _evaluating(model), torch.no_grad():
        plain = trained_token_nll(model, batch, forward)
        fused = trained_token_nll(model, batch, dataclasses.replace(forward, fused_head=True))
    return float((fused - plain).norm() / plain.norm()) <= (EXACT if exact else 100 * EXACT)


def check_router(model: Any, router: RouterLoss, forward: Forward, *, device: Any) -> None:
    """Raises ValueError if the router's loss of a pack differs from the model's."""
    batch = to_device(collate([_documents(model)[2]]), device)
    forward = dataclasses.replace(forward, fused_head=False, router=router)
    with _evaluating(model), torch.no_grad():
        of_model = model(
            **model_inputs(batch, forward.document_inputs, alone=forward.alone), output_router_logits=True
        ).get("aux_loss")
        total = trained_losses(model, batch, forward).router
    assert total is not None
    computed = float(total) / int(batch["lengths"].sum())
    if of_model is None or not math.isclose(computed, float(of_model), rel_tol=1e-2):
        raise ValueError(
            f"training.router_aux_loss_coef: the router's loss of a {_config_of(model).model_type} model is {of_model} "
            f"and sft-flow computes {computed:.6g}; it does not support this loss, set it to 0"
        )
