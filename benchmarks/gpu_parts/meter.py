"""A meter of training steps, the same for each side: time, waits, kernels, memory. And the device's two ceilings."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd import DeviceType
from transformers import TrainerCallback

from sft_core.train.speed import peak_flops_per_s, peak_memory_gib

log = logging.getLogger(__name__)
SYNC_WARNING = "synchronizing CUDA operation"  # what torch.cuda.set_sync_debug_mode warns of


@dataclasses.dataclass(frozen=True)
class Measured:
    """step_s: the mean of the timed steps. syncs, busy_s: of one step more: how often the host waited for the device,
    and how long a kernel ran; None where there is no GPU, or its profiler tells nothing. wait_share: of the timed
    steps, waiting for the loader."""

    step_s: float
    wait_share: float
    peak_gib: float
    reserved_gib: float | None
    syncs: int | None
    sync_places: dict[str, int]
    busy_s: float | None

    @property
    def idle_share(self) -> float | None:
        """Kernel times are those of a step under the profiler, which slows the host; the step's is without it."""
        return None if self.busy_s is None else max(0.0, 1 - self.busy_s / self.step_s)


class Meter:
    """To be told of each finished step. The first `warm` warm up, the next `timed` count, and one more is looked into,
    which makes it slower. All its own waits for the device are at the bounds of these three."""

    def __init__(self, device: str, *, warm: int, timed: int):
        self.device, self.warm, self.timed = torch.device(device), warm, timed
        self._on_gpu = self.device.type == "cuda"
        self._waited = self._begun = self._seconds = 0.0
        self._is_timed = False
        self._inside: contextlib.ExitStack | None = None
        self._warnings: list[Any] = []
        self._profile: Any = None
        self.busy_s: float | None = None
        if self._on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    @property
    def num_steps(self) -> int:
        return self.warm + self.timed + 1

    def step_done(self, step: int) -> None:
        """step: from 1."""
        if step == self.warm:
            self._wait()
            self._begun, self._is_timed = time.perf_counter(), True
        elif step == self.warm + self.timed:
            self._wait()
            self._seconds, self._is_timed = time.perf_counter() - self._begun, False
            if self._on_gpu:
                with _told_in_the_log():
                    self._look_inside()
        elif step == self.num_steps:
            self.close()

    def close(self) -> None:
        """Ends the look into a step, also of a training that failed there."""
        inside, self._inside = self._inside, None
        if inside is not None:
            with _told_in_the_log():
                inside.close()

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

    def _look_inside(self) -> None:
        self._inside = stack = contextlib.ExitStack()
        stack.callback(self._sum_kernels)
        self._profile = stack.enter_context(
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True)
        )
        stack.callback(torch.cuda.synchronize)
        self._warnings = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        torch.cuda.set_sync_debug_mode("warn")

    def _sum_kernels(self) -> None:
        spans = sorted(
            (event.time_range.start, event.time_range.end)
            for event in self._profile.events()
            if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        )
        busy, until = 0.0, float("-inf")
        for start, end in spans:
            busy, until = busy + max(0.0, end - max(start, until)), max(until, end)
        self.busy_s = busy / 1e6 if spans else None
        self._profile = None

    def iterate(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """The iterator, with the time that one waits for it."""
        while True:
            begun = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                if self._is_timed:
                    self._waited += time.perf_counter() - begun
            yield item

    def result(self) -> Measured:
        places: dict[str, int] = {}
        for warning in self._warnings:
            if SYNC_WARNING in str(warning.message):
                place = f"{'/'.join(warning.filename.split('/')[-2:])}:{warning.lineno}"
                places[place] = places.get(place, 0) + 1
        return Measured(
            step_s=self._seconds / self.timed,
            wait_share=self._waited / self._seconds,
            peak_gib=peak_memory_gib(self.device),
            reserved_gib=torch.cuda.max_memory_reserved() / 2**30 if self._on_gpu else None,
            syncs=sum(places.values()) if self._on_gpu else None,
            sync_places=places,
            busy_s=self.busy_s,
        )


@contextlib.contextmanager
def _told_in_the_log() -> Iterator[None]:
    """A profiler that a machine does not allow must not cost the times that are measured already."""
    try:
        yield
    except Exception:
        log.exception("the look into a step failed")


class MeterSteps(TrainerCallback):
    def __init__(self, meter: Meter):
        self._meter = meter

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._meter.step_done(state.global_step)


# Ceilings


def seconds_of(run: Any, *, device: str, repeats: int, warm: int = 2) -> float:
    """The mean of several calls, by the device's own clock where it has one."""
    for _ in range(warm):
        run()
    if device != "cuda":
        begun = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - begun) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def copy_ceiling(device: str) -> float:
    """Bytes a second, read and written."""
    source = torch.empty(2**30 if device == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device=device, repeats=20)


def matmul_ceiling(device: str) -> float:
    """bfloat16 FLOP/s."""
    size = 8192 if device == "cuda" else 256
    one, other = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(one)
    return 2 * size**3 / seconds_of(lambda: torch.mm(one, other, out=product), device=device, repeats=30, warm=5)


def sheet_peak(device: str) -> float | None:
    return peak_flops_per_s(torch.device(device))
