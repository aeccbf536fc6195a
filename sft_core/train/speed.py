"""FLOPs of training, peak FLOP/s of devices: their ratio is the MFU (PaLM, arXiv 2204.02311)."""

from __future__ import annotations

import functools
import logging
import re
import resource
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from sft_core.train.flops import Flops

log = logging.getLogger(__name__)

# Dense bfloat16 FLOP/s with fp32 accumulation, by words of the name that CUDA or ROCm gives. NVIDIA's and AMD's data
# sheets; for GeForce and RTX the white papers of GA102, Ada and RTX Blackwell. NVIDIA prints twice as much where it
# assumes sparse weights. "A10G" is AWS's slower A10, and "H100" and "H200" without more words are the SXM modules.
_PEAKS = {
    "RTX 3090": 71e12,
    "RTX 4090": 165.2e12,
    "RTX 5090": 209.5e12,
    "RTX 6000 Ada": 364.2e12,
    "RTX PRO 6000 Blackwell": 503.8e12,
    "A10": 125e12,
    "A10G": 70e12,
    "A100": 312e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "H20": 148e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "B300": 2250e12,
    "GB300": 2500e12,
    "MI300X": 1307e12,
    "MI325X": 1307e12,
    "MI355X": 2517e12,
}
# Names of slower devices that contain a name of the table: a part of a device, or a variant with less power.
_SLOWER = re.compile(r"\b(MIG|Laptop|Max-Q|4090 D|5090 D)\b")


def batch_flops(flops: Flops, batch: Mapping[str, Any]) -> float:
    """FLOPs of a batch (collate.Batch), forward and backward, by its counts on the CPU."""
    lengths = batch["lengths"].astype(np.float64)
    return float(flops.of(lengths.sum(), (lengths**2).sum(), float(batch["num_targets"].sum())))


def peak_flops_per_s(device: torch.device) -> float | None:
    """The device's peak; None if the table lacks it: then FLOP/s are logged and MFU is not."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


@functools.cache  # so that an unknown name is logged once
def peak_of(name: str) -> float | None:
    """The peak of the longest name in the table that this name contains, in whole words; None: there is none."""
    names = [known for known in _PEAKS if re.search(rf"\b{known}\b", name)]
    if not names or _SLOWER.search(name):
        log.info("no peak FLOP/s is known of %s: FLOP/s are logged, MFU is not", name)
        return None
    return _PEAKS[max(names, key=len)]


def peak_memory_gib(device: torch.device) -> float:
    """The largest memory of this process so far: on the GPU, or resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
