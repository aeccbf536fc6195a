"""Counts the memory of a forward and backward pass beside weights, gradients and optimizer, without a formula.

The model's code runs forward and backward on torch's fake tensors, which have a shape and no memory. A ledger counts
each storage from the operation that makes it until its last reference is gone. So the count includes what torch really
does: tensors that autograd keeps, layers that checkpointing computes again, copies that autocast makes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sft_core.train.memory.fake_cuda import DOCUMENTS, FusedHead, OnCuda, patch_liger


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes by part at the peak. The allocator's waste and CUDA's own 0.5 GiB are not included."""

    layers: float  # kept for the backward pass; with checkpointing: the layers' inputs, and one layer in full
    weight_copies: float  # in 16 bits, made by autocast
    mask: float  # of all pairs of tokens, if attention isolates documents by a mask; with each layer's copy
    head: float

    @property
    def total(self) -> float:
        return self.layers + self.weight_copies + self.mask + self.head


class UnknownActivations(RuntimeError):
    """The model's code does not run on fake tensors."""


MOST_CALLS = 1000  # of torch's functions in a layer; a layer with more calls loops over tokens


def activation_bytes(
    shape: Any,
    *,
    tokens: int,
    bf16: bool,
    checkpointing: bool,
    attention: str,
    trained_share: float = 1.0,
    dtype: str = "float32",
    liger: bool = False,
    lora: Any = None,
    in_4bit: bool = False,
    device: str = "cuda",
) -> Activations:
    """The activations of one micro-batch: a sequence of documents with `tokens` tokens in total.

    shape: the model without weights (model.skeleton); it is not changed. bf16: autocast. attention: a name that
    transformers knows, or the name of a kernel that takes the bounds of documents. trained_share: of the tokens. dtype:
    of the weights. liger: with Liger's kernels. lora: peft's LoraConfig; then the model's weights are frozen, and with
    in_4bit in 4 bits. device: cuda, where the head never holds all logits, or cpu.

    Gradients exist before the pass, as when micro-batches accumulate. Call it before Liger patches the model's classes:
    its kernels do not run on fake tensors. Raises UnknownActivations.
    """
    try:
        model = copy.deepcopy(shape)
        _set_types(model, getattr(torch, dtype), in_4bit=in_4bit)
        if lora is not None:
            from peft import get_peft_model

            get_peft_model(model, lora)  # puts LoRA's layers into the model and freezes the others
            if checkpointing:
                model.enable_input_require_grads()  # as SFTTrainer does
        with _no_tracebacks(), FakeTensorMode(allow_non_fake_inputs=True):
            _make_fake(model)
            _choose_kernels(model.train(), attention=attention, checkpointing=checkpointing, liger=liger, device=device)
            return _count(model, tokens, max(1, round(trained_share * (tokens - 1))), bf16, device)
    except Exception as error:  # any model's code may raise any type
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UnknownActivations(f"{type(shape).__name__} does not run on fake tensors: {reason}") from error


def _choose_kernels(model: Any, *, attention: str, checkpointing: bool, liger: bool, device: str) -> None:
    is_known = attention in ("sdpa", "eager") or device != "cuda"
    model.config._attn_implementation = attention if is_known else DOCUMENTS
    if checkpointing:
        # torch turns modes off during the backward pass, also when it computes a layer again: turn them on there.
        again = {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), _kernels(device))}
        model.activation_checkpointing_enable(again)
    if liger:
        patch_liger(model)


@contextlib.contextmanager
def _no_tracebacks() -> Iterator[None]:
    """Silences torch's log of failures on fake tensors: they are raised as errors anyway."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was_disabled


def _set_types(model: Any, dtype: torch.dtype, *, in_4bit: bool) -> None:
    model.to(dtype)
    if in_4bit:  # such layers compute with weights that they expand to 16 bits, so autocast copies nothing
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
                module.to(torch.bfloat16)


def _make_fake(model: Any) -> None:
    """Replaces tensors on the meta device by fake tensors; shared parameters stay shared."""
    parameters: dict[Any, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in parameters:
                    values = torch.empty(parameter.shape, dtype=parameter.dtype)
                    parameters[parameter] = torch.nn.Parameter(values, parameter.requires_grad)
                module._parameters[name] = parameters[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _kernels(device: str) -> contextlib.AbstractContextManager[Any]:
    return OnCuda() if device == "cuda" else contextlib.nullcontext()


def _count(model: Any, tokens: int, num_trained: int, bf16: bool, device: str) -> Activations:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    ids, position_ids = (torch.empty(1, tokens, dtype=torch.int64) for _ in range(2))
    labels, before_labels = (torch.empty(num_trained, dtype=torch.int64) for _ in range(2))
    batch = {"input_ids": ids, "position_ids": position_ids, "use_cache": False}
    ledger = Ledger(model, tokens)

    def enter_head(module: Any, args: Any, output: Any) -> None:
        ledger.part = "head"
        output[0].register_hook(leave_head)

    def leave_head(gradient: torch.Tensor) -> None:
        ledger.part = "layers"

    model.base_model.register_forward_hook(enter_head)
    with ledger, CallLimit(model.config.get_text_config().num_hidden_layers), _kernels(device):
        # As in accelerate, autocast ends with the model's forward; it keeps its copies of weights until then.
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if device == "cuda":
                hidden = model.base_model(**batch)[0][0, :-1]
                head = model.get_output_embeddings()
                nll = -FusedHead.apply(hidden[before_labels], head.weight, head.bias)
            else:
                logits = model(**batch, logits_to_keep=before_labels).logits[0]
        if device != "cuda":
            nll = F.cross_entropy(logits.float(), labels, reduction="none")
            del logits
        nll.sum().backward()
    return Activations(**ledger.peak)


class CallLimit(TorchFunctionMode):
    """Raises RuntimeError after too many calls of torch's functions.

    A loop over tokens would take minutes to count, and the kernels that really train such models keep other tensors.
    The ledger cannot raise it: torch ends the process if some operations fail at its level.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self._num_left = MOST_CALLS * (num_layers + 1)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._num_left -= 1
        if self._num_left < 0:
            raise RuntimeError(f"its layers call torch more than {MOST_CALLS:,} times, as a loop over tokens does")
        return func(*args, **(kwargs or {}))


class Ledger(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, by part; `peak`: the counts when their sum was largest.

    The model's weights, gradients and buffers are not counted.
    """

    def __init__(self, model: Any, tokens: int):
        super().__init__()
        self.part = "layers"
        self._pairs = (1, 1, tokens, tokens)
        self._now = {"layers": 0, "weight_copies": 0, "mask": 0, "head": 0}
        self._most, self.peak = 0, dict(self._now)
        self._weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        held = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]
        self._storages = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_grouped = func is torch.ops.aten._grouped_mm.default
        out = _grouped_product(*args, **kwargs) if is_grouped else func(*args, **kwargs)
        is_copy = func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                is_mask = tuple(tensor.shape) == self._pairs
                self._add(tensor.untyped_storage(), "weight_copies" if is_copy else "mask" if is_mask else self.part)
        return out

    def _add(self, storage: Any, part: str) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self._now[part] += num_bytes
        if (held := sum(self._now.values())) > self._most:
            self._most, self.peak = held, dict(self._now)
        weakref.finalize(storage, self._remove, key, num_bytes, part).atexit = False

    def _remove(self, key: int, num_bytes: int, part: str) -> None:
        self._storages.remove(key)
        self._now[part] -= num_bytes


def _grouped_product(
    a: torch.Tensor, b: torch.Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    """The product of stacked experts, of any type: torch's version for fake tensors takes only bfloat16."""
    if a.ndim == b.ndim == 2:
        return a.new_empty(len(offs), a.shape[0], b.shape[1], dtype=out_dtype)
    return a.new_empty(*a.shape[-3 if a.ndim == b.ndim else -2 : -1], b.shape[-1], dtype=out_dtype)
