"""Training ends at the first loss, gradient norm or weight that is not finite; nothing of it is logged or saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from sft_core.recipe.wording import some

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sft_core.train.collate import Batch


MAX_STEPS = 16  # a flag of a byte for each trained token of these steps is on the device


class NotFiniteError(ValueError):
    """A number of training is infinite or no number. The message says what to do."""


class _MicroBatch(NamedTuple):
    loss: torch.Tensor  # bool, shape (): whether it is finite
    tokens: torch.Tensor  # bool, shape (N,): whether the loss of each trained token is finite
    entries: np.ndarray  # int64, shape (D,): the documents' numbers in the plan; empty without packs
    num_targets: np.ndarray  # int64, shape (D,): trained tokens of each document

    def suspects(self) -> np.ndarray:
        """The documents with a token whose loss is not finite; all of them where there is none."""
        if not len(self.entries):
            return self.entries
        of_token = np.repeat(self.entries, self.num_targets)
        wrong = of_token[~self.tokens.cpu().numpy()]
        return np.unique(wrong) if len(wrong) else self.entries


class _Step(NamedTuple):
    number: int
    batches: list[_MicroBatch]
    norm: torch.Tensor  # bool, shape (): whether the norm of the gradients is finite


class FiniteSteps:
    """Whether the losses and the gradient norm of each step are finite.

    The answers stay on the device until `check`. Call it where the host waits for the device anyway: before a line of
    the log, an evaluation, a checkpoint. After MAX_STEPS steps without a call they are checked, too. name_rows: returns
    a text that names documents of the plan.
    """

    def __init__(self, accelerator: Accelerator, name_rows: Callable[[np.ndarray], str]):
        self._accelerator, self._name_rows = accelerator, name_rows
        self._batches: list[_MicroBatch] = []
        self._steps: list[_Step] = []

    def add_loss(self, loss: torch.Tensor, nll_N: torch.Tensor, batch: Batch) -> None:
        """The loss of a micro-batch, shape (), and those of its trained tokens, shape (N,)."""
        is_finite, are_finite = loss.detach().isfinite(), nll_N.detach().isfinite()
        self._batches.append(_MicroBatch(is_finite, are_finite, batch["entries"], batch["num_targets"]))

    def end_step(self, number: int, norm: torch.Tensor | float) -> None:
        """norm: of the gradients of all ranks. Raises as `check` does, in every MAX_STEPS-th step without one."""
        is_finite = norm.detach().isfinite() if isinstance(norm, torch.Tensor) else torch.tensor(math.isfinite(norm))
        is_finite = is_finite.to(self._batches[0].loss.device, non_blocking=True).reshape(())
        self._steps.append(_Step(number, self._batches, is_finite))
        self._batches = []
        if len(self._steps) == MAX_STEPS:
            self.check()

    def check(self) -> None:
        """Raises NotFiniteError for the first step that is not finite, on all ranks. All ranks call it together."""
        steps, self._steps = self._steps, []
        if not steps:
            return
        losses = (torch.stack([batch.loss for batch in step.batches]).all() for step in steps)
        flags = torch.stack([torch.stack([loss, step.norm]) for loss, step in zip(losses, steps, strict=True)])
        flags = flags.to(torch.uint8)
        are_finite = self._accelerator.gather(flags[None]).reshape(-1, len(steps), 2).amin(dim=0).tolist()
        for step, (loss, norm) in zip(steps, are_finite, strict=True):
            if not (loss and norm):
                raise NotFiniteError(self._message(step, is_loss=not loss))

    def _message(self, step: _Step, *, is_loss: bool) -> str:
        wrong = [batch for batch in step.batches if not (is_loss and bool(batch.loss))]
        mine = np.concatenate([np.empty(0, np.int64), *(batch.suspects() for batch in wrong)]).astype(np.int64)
        rows = [text for text in self._of_all_ranks(self._name_rows(mine) if len(mine) else "") if text]
        cause = "the loss" if is_loss else "the norm of the gradients"
        return (
            f"step {step.number}: {cause} is not finite, so training ended; the last whole checkpoint is kept. "
            f"Its rows: {'; '.join(rows)} (`sft lineage RUN --row ID` shows a row). "
            "Where the loss rose before (logs/log.jsonl), lower training.learning_rate, raise "
            "training.warmup_ratio or set training.max_grad_norm; where it is so from the first step on, look at these "
            "rows and at the start model"
        )

    def _of_all_ranks(self, text: str) -> list[str]:
        if self._accelerator.num_processes == 1:
            return [text]
        from accelerate.utils import gather_object

        return gather_object([text])


def check_weights(parameters: Iterable[tuple[str, torch.Tensor]], origin: str) -> None:
    """Raises NotFiniteError with the names of tensors that hold infinities or NaN. origin: where they are from."""
    here = {name: _here(tensor.detach()) for name, tensor in parameters if tensor.is_floating_point()}
    here = {name: tensor for name, tensor in here.items() if tensor.numel() and not tensor.is_meta}
    if not here:
        return
    flags = [tensor.isfinite().all() for tensor in here.values()]
    are_finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    names = [name for name, is_finite in zip(here, are_finite, strict=True) if not is_finite]
    if names:
        raise NotFiniteError(f"{origin}: {len(names)} of {len(here)} tensors hold infinities or NaN: {some(names)}")


def _here(tensor: Any) -> torch.Tensor:
    """What of a tensor this rank holds: a shard under ZeRO-3 (DeepSpeed's ds_tensor) and FSDP2 (a DTensor)."""
    if hasattr(tensor, "ds_tensor"):
        return tensor.ds_tensor
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
