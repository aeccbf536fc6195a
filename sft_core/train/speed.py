"""How much training computes, and what a device can do: the share that is used (MFU, of PaLM, arXiv 2204.02311)."""

from __future__ import annotations

import resource
import sys

import torch

# Dense bfloat16 FLOP/s by the makers' data sheets, by a part of the name that CUDA gives.
_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def batch_flops(position_ids: torch.Tensor, linear: float, quadratic: float) -> float:
    """The sum of linear * L + quadratic * L**2 over the batch's documents: attention sees a document, not a pack.

    position_ids: restart at 0 with each document. The sum of 2 p + 1 over the positions 0 to L - 1 is L squared.
    """
    num_tokens = position_ids.numel()
    return linear * num_tokens + quadratic * (2 * int(position_ids.sum()) + num_tokens)


def peak_flops_per_s(device: torch.device) -> float | None:
    """None for a device that the table does not know: there is no MFU then, only FLOP/s."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """The most that this process held so far: on the GPU, or of resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
