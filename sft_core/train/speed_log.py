"""The speed and memory of training between two lines of its log: tokens/s, FLOP/s, MFU, GiB, seconds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from sft_core.train.collate import Batch
from sft_core.train.flops import Flops
from sft_core.train.speed import batch_flops, peak_flops_per_s, peak_memory_gib

if TYPE_CHECKING:
    from accelerate import Accelerator


class SpeedLog:
    """Counts each forward of this rank; `line` sums the counts over the ranks and begins anew."""

    def __init__(self, flops: Flops, accelerator: Accelerator):
        self._flops, self._accelerator = flops, accelerator
        self._num_tokens = self._num_trained = 0
        self._flops_done = 0.0
        self._last_line = time.monotonic()

    def count(self, batch: Batch) -> None:
        """Counts a forward and backward of a batch, by the batch's counts on the CPU: the host does not wait."""
        self._num_tokens += int(batch["lengths"].sum())
        self._num_trained += int(batch["num_targets"].sum())
        self._flops_done += batch_flops(self._flops, batch)

    def line(self, *, evaluation_s: float) -> dict[str, float]:
        """The metrics since the last line. All ranks call it together.

        evaluation_s: seconds of evaluation since the last line. `seconds` holds them; the speeds leave them out.
        """
        seconds = time.monotonic() - self._last_line
        training_s, device = seconds - evaluation_s, self._accelerator.device
        counts = torch.tensor(
            [float(self._num_tokens), float(self._num_trained), self._flops_done], dtype=torch.float64, device=device
        )
        num_tokens, num_trained, flops = self._accelerator.reduce(counts, reduction="sum").tolist()
        self._num_tokens, self._num_trained, self._flops_done = 0, 0, 0.0
        self._last_line = time.monotonic()
        flops_per_s = flops / training_s / self._accelerator.num_processes
        line = {"seconds": round(seconds, 3), "tflops_per_s": float(f"{flops_per_s / 1e12:.4g}")}  # of a rank
        if peak := peak_flops_per_s(device):
            line["mfu"] = round(flops_per_s / peak, 4)
        memory = torch.tensor([peak_memory_gib(device)], dtype=torch.float64, device=device)
        return line | {
            "memory_gib": round(self._accelerator.gather(memory).max().item(), 3),
            "tokens_per_s": round(num_tokens / training_s, 1),
            "trained_tokens_per_s": round(num_trained / training_s, 1),
        }
