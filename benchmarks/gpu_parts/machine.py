"""a: what machine this is, what is installed, and what the device can do at most: later shares are told of that."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import traceback
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu_parts.meter import copy_ceiling, matmul_ceiling, sheet_peak
from benchmarks.gpu_parts.rows import Case, Context, Row, cases

PACKAGES = (
    "torch", "transformers", "trl", "accelerate", "peft", "liger-kernel", "triton", "deepspeed", "bitsandbytes",
    "flash-attn", "metaflow", "pytest",
)  # fmt: skip


def run(context: Context) -> Iterator[Row]:
    yield from cases(context, listed(context))


def listed(context: Context) -> list[Case]:
    return [
        Case("device", 0, lambda: device_rows(context), is_core=True),
        Case("versions", 0, lambda: [context.row("versions", note=", ".join(map(told, PACKAGES)))], is_core=True),
        Case("ceilings", 3, lambda: ceiling_rows(context), is_core=True),
        Case("kernels that compile at run time (Triton)", 5, lambda: triton_rows(context), is_core=True),
    ]


def told(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} absent"


def device_rows(context: Context) -> Iterator[Row]:
    python = f"Python {platform.python_version()}, {os.cpu_count()} cores, {_free_gb(context):.0f} GB free for files"
    if not context.on_gpu:
        yield context.row("device", note=f"CPU; {python}; tiny models: nothing here is a measurement")
        return
    properties = torch.cuda.get_device_properties(0)
    memory, capability = properties.total_memory / 2**30, torch.cuda.get_device_capability()
    yield context.row(
        "device",
        memory,
        "GiB",
        f"{properties.name}, compute capability {capability[0]}.{capability[1]}, driver {_driver()}, "
        f"CUDA {torch.version.cuda}; {python}",
        key="device_gib",
    )


def _free_gb(context: Context) -> float:
    return shutil.disk_usage(context.folder).free / 1e9


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def ceiling_rows(context: Context) -> Iterator[Row]:
    copied, flops = copy_ceiling(context.device), matmul_ceiling(context.device)
    yield context.row("copy of 1 GiB, read and written", copied / 1e9, "GB/s", key="ceiling_gb_per_s")
    peak = sheet_peak(context.device)
    note = f"{100 * flops / peak:.0f} % of the data sheet's {peak / 1e12:.0f}" if peak else ""
    yield context.row("bf16 matmul of 8192-cubes", flops / 1e12, "TFLOP/s", note, key="ceiling_tflops")


def triton_rows(context: Context) -> Iterator[Row]:
    """Liger and the fused head compile at first use, for which a C compiler must be there."""
    if not context.on_gpu:
        yield context.row("kernels that compile at run time (Triton)", note="on a GPU only")
        return
    name = "kernels that compile at run time (Triton)"
    try:
        error, note = _liger_error(), "Liger's norm beside torch's"
    except Exception as failure:  # what a compiler that is not there makes of it
        traceback.print_exc()
        error, note = float("inf"), f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}; left out below"
    works = error < 1e-3
    yield context.row(name, int(works), "", note, passed=works, key="triton_works")


def _liger_error() -> float:
    from liger_kernel.transformers import LigerRMSNorm

    norm = LigerRMSNorm(256).cuda()
    rows = torch.randn(4, 256, device="cuda", requires_grad=True)
    expected = torch.nn.functional.rms_norm(rows, (256,), eps=1e-6)
    found = norm(rows)
    found.sum().backward()
    return float((found - expected).norm() / expected.norm())
