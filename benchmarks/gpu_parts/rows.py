"""What a part tells: rows of numbers and checks; and the goals that the numbers are held against. No torch here."""

from __future__ import annotations

import dataclasses
import gc
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


@dataclasses.dataclass(frozen=True)
class Row:
    """number: what was measured; None where there is none. passed: of a check; None for a number alone. key: by which
    goals and the headline know the number."""

    part: str
    what: str
    number: float | int | None = None
    unit: str = ""
    note: str = ""
    passed: bool | None = None
    key: str | None = None

    def line(self) -> str:
        shown = (
            "" if self.number is None else f"{self.number:,.4g}" if abs(self.number) < 1000 else f"{self.number:,.0f}"
        )
        if self.passed is not None:
            shown = f"{shown} {'ok' if self.passed else 'FAILED'}".strip()
        return f"{self.part:<4} {self.what:<52} {shown:>14} {self.unit:<9} {self.note}".rstrip()


HEADER = f"{'part':<4} {'what':<52} {'number':>14} {'unit':<9} note"


@dataclasses.dataclass
class Context:
    """Where a part runs, until when (of time.monotonic), and what earlier parts found (`facts`)."""

    part: str
    device: str
    deadline: float
    folder: Path
    facts: dict[str, float]

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def row(self, what: str, number: float | int | None = None, unit: str = "", note: str = "", **more: Any) -> Row:
        return Row(self.part, what, number, unit, note, **more)

    def fact(self, key: str, measure: Callable[[], float]) -> float:
        """What an earlier part found, or else what is measured now."""
        if key not in self.facts:
            self.facts[key] = measure()
        return self.facts[key]


CPU_CASE_S = 4.0  # of a tiny model


class Case(NamedTuple):
    """seconds: that it takes on a GPU; 0 where nothing is measured. is_core: the part's share of the default time has
    room for it; the others are for what is left."""

    name: str
    seconds: float
    run: Callable[[], Iterable[Row]]
    is_core: bool = False


def cases(context: Context, listed: Iterable[Case]) -> Iterator[Row]:
    """The rows of one case after another. One that fails tells its error, one for which no time is left says so, and
    the next goes on."""
    for name, seconds, run, _ in listed:
        if seconds and context.left() < (seconds if context.on_gpu else min(seconds, CPU_CASE_S)):
            yield context.row(
                name, note=f"left out: it takes about {seconds:.0f} s, and {max(0.0, context.left()):.0f} s are left"
            )
            continue
        try:
            yield from run()
        except TimeoutError:
            yield context.row(name, note="ended, for the part's time was over")
        except Exception as error:
            yield error_row(context, name, error)
        free()


def error_row(context: Context, name: str, error: BaseException) -> Row:
    traceback.print_exception(error)  # whole, into the log
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())
    return context.row(name, note=f"{type(error).__name__}: {text[:300]}{place}", passed=False)


def free() -> None:
    """Gives memory back that a finished case held."""
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


# Goals, on one H100 of 80 GB; docs/results.md has them in a table. Each: the number's key, whether more or less of it
# is better, the bound, its unit.
GOALS: tuple[tuple[str, str, float, str], ...] = (
    ("3b.8k.ours.tokens_per_s", ">=", 20_000, "tokens/s"),
    ("3b.8k.ours.mfu", ">=", 38, "%"),
    ("3b.8k.ours.syncs", "<=", 2, ""),
    ("3b.64k_of_5k.ours.tokens_per_s", ">=", 14_000, "tokens/s"),
    ("3b.64k_of_5k.ours.peak_gib", "<=", 75, "GiB"),
    ("3b.64k_of_64k.ours.tokens_per_s", ">=", 6_500, "tokens/s"),
    ("135m.4k.ours.mfu", ">=", 25, "%"),
    ("3b.8k.beside_trl", ">=", 1.0, "x"),
    ("135m.4k.beside_trl", ">=", 1.3, "x"),
    ("3b.8k.memory_beside_trl", "<=", 1.0, "x"),
    ("135m.4k.memory_beside_trl", "<=", 1.0, "x"),
    ("3b.8k.ours.loader_wait", "<", 1, "%"),
    ("135m.4k.ours.loader_wait", "<", 1, "%"),
    ("3b.save_stops_s", "<", 10, "s"),
)


def goal_rows(rows: Iterable[Row]) -> list[Row]:
    """A missed goal is told, and is no failed check."""
    numbers = {row.key: row.number for row in rows if row.key is not None and row.number is not None}
    told = []
    for key, direction, bound, unit in GOALS:
        number, wanted = numbers.get(key), f"wanted {direction} {bound:,g}"
        if number is None or math.isnan(number):
            told.append(Row("goal", key, None, unit, f"not measured; {wanted}"))
            continue
        met = {">=": number >= bound, "<=": number <= bound, "<": number < bound}[direction]
        told.append(Row("goal", key, number, unit, f"{'met' if met else 'MISSED'}; {wanted}"))
    return told


def headline(rows: Iterable[Row]) -> dict[str, Any]:
    """The numbers that have a key, and the names of what failed."""
    rows = list(rows)
    return {
        **{row.key: row.number for row in rows if row.key is not None},
        "missed": [row.what for row in rows if row.part == "goal" and row.note.startswith("MISSED")],
        "failed": [f"{row.part}: {row.what}" for row in rows if row.passed is False],
    }
