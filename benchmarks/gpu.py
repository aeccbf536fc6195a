"""The one command that proves this on a real GPU: every claim that needs one, measured or checked in eight minutes.

    python benchmarks/gpu.py                          # make gpu
    python benchmarks/gpu.py --device cpu             # make gpu-dry: whether the script runs; its numbers mean nothing

Needs neither network, weights nor a store: models are drawn from configs, packs are of random ids, and our own trainer
trains them by the function that a rank runs (sft_core/train/main.py). Parts, in the order of what they are worth:

    a  the machine, and its two ceilings: copies and matrix products
    b  packed documents are those by themselves, forward and backward, beside a planted leak; milliseconds by attention
    c  steps of SmolLM3-3B's shape at 8,192 and 65,536 tokens: ours, TRL packed, a bare loop over transformers' model
    d  135 M, 360 M and 1.7 B: packs a forward; without Liger, without the fused head
    e  the tests that need a GPU
    f  a kill and a resume beside an unbroken run; how long a save of 3 B stops training
    g  LoRA, with added tokens on tied weights, QLoRA: the loss falls, merged is adapted
    h  zero2, zero3, fsdp2 on one rank beside ddp
    i  tokens that are generated in a second
    j  the quickstart flow, then again with every output in its store

Each part is a process of this script, ended with all its own when its time is over; what a part leaves goes to the
next ones. A row is printed and the JSON file rewritten as soon as a number is there, so that a kill loses nothing. What
a part's libraries print is in the log beside the JSON file. A part that fails tells its error and the next goes on; the
exit status is 1 where a check failed. A missed goal is told, and fails nothing. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_parts.process import Ahead, alone_of_its_group, lines_only, order  # noqa: E402
from benchmarks.gpu_parts.rows import HEADER, Context, Row, error_row, goal_rows, headline  # noqa: E402


class Part(NamedTuple):
    """share: of the seconds, before what earlier parts leave or take."""

    module: str
    share: float
    dry_share: float


PARTS = {
    "a": Part("machine", 12, 12),
    "b": Part("packed", 34, 14),
    "c": Part("large_steps", 110, 28),
    "d": Part("small_steps", 49, 22),
    "e": Part("gpu_tests", 97, 24),
    "f": Part("resuming", 50, 40),
    "g": Part("adapters", 31, 16),
    "h": Part("strategies", 33, 40),
    "i": Part("generating", 16, 16),
    "j": Part("quickstart", 48, 2),
}
SECONDS = 480.0  # by default; the shares are made for it
LEAST_S = 1.0  # for which a part is not begun
READY_S = 120.0  # to import all, from a disk that is cold
KILL_AFTER_S = 5.0  # past its time; a part looks at the clock before each of its cases


def main() -> int:
    options = _parse()
    if options.part is not None:
        return run_part(options.part, options.device)
    if options.task is not None:
        return run_task(options.task, options.device)
    os.chdir(ROOT)
    report = Report(options.out, {"seconds": options.seconds, "device": options.device, "parts": options.parts})
    drive(options, report)
    if options.device == "cuda":
        for row in goal_rows(report.rows):
            report.add(row)
    told = headline(report.rows)
    print(json.dumps(told))
    return 1 if told["failed"] else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        help="for all parts together, once the first one is ready (default: %(default)s)",
    )
    parser.add_argument("--parts", type=_parts, default=list(PARTS), help="as a,b,c; default: all", metavar="NAMES")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu.json", help="default: %(default)s")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    return parser.parse_args()


def _parts(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return names


class Report:
    """Rows, printed and written as they come."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.rows: list[Row] = []
        self._path, self._settings = path, {**settings, "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        print(HEADER, flush=True)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        told = {"settings": self._settings, "rows": [dataclasses.asdict(row) for row in self.rows]}
        unfinished = self._path.with_name(f".{self._path.name}")
        unfinished.write_text(json.dumps({**told, "headline": headline(self.rows)}, indent=1))
        unfinished.replace(self._path)  # a reader never sees half of it
        print(row.line(), flush=True)  # after it is in the file: what was printed is not lost


# The parts, one after another


class Clock:
    """The time of all parts together. It runs from when the first one is ready: what imports take, a cold disk
    decides."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._begun: float | None = None

    def begin(self) -> None:
        self._begun = time.monotonic() if self._begun is None else self._begun

    def left(self) -> float:
        return self._seconds - (0.0 if self._begun is None else time.monotonic() - self._begun)


def drive(options: argparse.Namespace, report: Report) -> None:
    shares = {name: PARTS[name].share if options.device == "cuda" else PARTS[name].dry_share for name in options.parts}
    clock, log = Clock(options.seconds), options.out.with_suffix(".log")
    log.write_text("")
    waiting: dict[str, Ahead] = {}
    names = [*options.parts]
    try:
        for place, name in enumerate(names):
            # The next one imports meanwhile: each takes ten seconds for that.
            for ahead in names[place : place + 2]:
                if ahead not in waiting:
                    waiting[ahead] = Ahead(["--part", ahead, "--device", options.device], log=log, own_group=True)
            share = shares[name] / sum(shares[other] for other in names[place:])
            for row in rows_of(name, waiting[name], clock, share, report.rows, log):
                report.add(row)
    finally:
        for process in waiting.values():
            process.end()


def rows_of(name: str, process: Ahead, clock: Clock, share: float, so_far: list[Row], log: Path) -> Iterator[Row]:
    """share: the part's, of the seconds that are left when it is ready."""
    begun, seconds, note, module = time.monotonic(), 0.0, "", PARTS[name].module
    facts = {row.key: row.number for row in so_far if row.key is not None and row.number is not None}
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as folder:
        try:
            if clock.left() >= LEAST_S:
                process.wait_until_ready(READY_S)
                clock.begin()
            begun, seconds = time.monotonic(), share * clock.left()
            if seconds < LEAST_S:
                yield Row(name, module, note="left out: no time is left")
                return
            for line in process.go({"seconds": seconds, "folder": folder, "facts": facts}, seconds + KILL_AFTER_S):
                yield Row(**line)
        except TimeoutError:
            note = "; ended, for its time was over"
        except RuntimeError as error:
            last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
            yield Row(name, module, note=f"{error}: {' '.join(last)[:200]}", passed=False)
    took = time.monotonic() - begun
    yield Row(name, f"part {name} ({module})", took, "s", f"of {seconds:.0f} s{note}")


# In a process of its own


def run_part(name: str, device: str) -> int:
    with lines_only() as lines:
        logging.basicConfig(level=logging.INFO, format=f"{name} %(message)s")
        module, failed = None, None
        try:
            module = importlib.import_module(f"benchmarks.gpu_parts.{PARTS[name].module}")
        except Exception as error:  # of a library that is not as expected: told when it is this part's turn
            failed = error
        told = order(lines)
        deadline = time.monotonic() + told["seconds"]
        context = Context(name, device, deadline, Path(told["folder"]), told["facts"])
        try:
            if module is None:
                raise failed or AssertionError
            _set_up(device)
            if told["facts"].get("triton_works") == 0:
                os.environ["GPU_BENCHMARK_NO_TRITON"] = "1"
            for row in module.run(context):
                lines.write(json.dumps(dataclasses.asdict(row)) + "\n")
        except Exception as error:
            lines.write(json.dumps(dataclasses.asdict(error_row(context, PARTS[name].module, error))) + "\n")
    return 0


def run_task(name: str, device: str) -> int:
    """Something that a part wants done in a process of its own: a function of benchmarks/gpu_parts/tasks.py."""
    with lines_only() as lines:
        logging.basicConfig(level=logging.INFO, format=f"{name} %(message)s")
        tasks = importlib.import_module("benchmarks.gpu_parts.tasks")
        told = order(lines)
        _set_up(device)
        lines.write(json.dumps(getattr(tasks, name)(device, **told)) + "\n")
    return 0


def _set_up(device: str) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if device == "cpu":
        os.environ.update(alone_of_its_group())
        return
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU; `make gpu-dry` (--device cpu) tries the script without one")


if __name__ == "__main__":
    sys.exit(main())
