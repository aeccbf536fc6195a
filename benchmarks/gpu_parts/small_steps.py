"""d: steps of small models, over whose packs a GPU waits for launches: packs a forward, Liger, the fused head."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.gpu_parts.jobs import Work
from benchmarks.gpu_parts.large_steps import beside, measured_rows
from benchmarks.gpu_parts.meter import sheet_peak
from benchmarks.gpu_parts.packed import attentions
from benchmarks.gpu_parts.rows import Case, Context, Row, cases
from benchmarks.gpu_parts.shapes import config_of, documents, tokens
from benchmarks.gpu_parts.sides import Run, Side, ours, trl

PACKS = 8  # a step


def run(context: Context) -> Iterator[Row]:
    yield from cases(context, listed(context))


def listed(context: Context) -> list[Case]:
    device = context.device
    short = documents(tokens(4096, device), tokens(1000, device))
    runs: dict[str, Run] = {}
    own = "flash_attention_2" if attentions(context)["flash_attention_2"] is None else "sdpa"

    def case(name: str, side: str, run: Side, lengths: list[int], seconds: float = 5, **more: Any) -> Case:
        settings = {key: more.pop(key) for key in ("attention", "fused_head") if key in more}
        is_core, steps = more.pop("is_core", False), more.pop("timed", 5)
        timed = steps if context.on_gpu else 1
        work = Work(
            config_of(name.split(".")[0], device), lengths, steps=2 * timed + 1, **{"packs_a_step": PACKS, **more}
        )
        settings |= {"warm": timed, "timed": timed}
        rows = functools.partial(measured_rows, context, name, side, run, work, runs, settings)
        return Case(f"{name} {side}", seconds, rows, is_core)

    def packs(number: int | None) -> dict[str, Any]:
        return {"packs_a_forward": number}

    core: dict[str, Any] = {"is_core": True}
    of_5k = {length: documents(tokens(length, device), tokens(5000, device)) for length in (8192, 32768)}
    return [
        case("135m.4k", "ours_1", ours, short, 10, **packs(1), **core),
        case("135m.4k", "ours_8", ours, short, **packs(8), **core),
        case("135m.4k", "ours_4", ours, short, **packs(4), **core),
        case("135m.4k", "trl_8", trl, short, **packs(8), **core, attention="varlen"),
        Case("135m.4k beside", 0, lambda: best(context, "135m.4k", runs), is_core=True),
        case("360m.4k", "ours_8", ours, short, **packs(8), **core),
        case("1700m.8k", "ours", ours, of_5k[8192], 7, packs_a_step=1, **core),
        case("135m.4k", "no_liger_8", ours, short, **packs(8), **core, liger=False),
        case("135m.4k", "no_fused_head_8", ours, short, **packs(8), **core, fused_head=False),
        case("135m.4k", "trl_1", trl, short, **packs(1), attention=own),
        case("135m.4k", "ours_auto", ours, short, **packs(None)),
        Case("135m.4k beside", 0, lambda: best(context, "135m.4k", runs)),
        case("360m.4k", "ours_1", ours, short, **packs(1)),
        case("360m.4k", "ours_4", ours, short, **packs(4)),
        case("1700m.32k", "ours", ours, of_5k[32768], 10, packs_a_step=1, timed=2),
    ]


def best(context: Context, name: str, runs: dict[str, Run]) -> Iterable[Row]:
    """The fastest of ours by packs a forward, under the name that the goals know, beside the fastest of TRL's."""
    mine = {key: run for key, run in runs.items() if key.startswith(f"{name}.ours_")}
    if not mine:
        return
    key = max(mine, key=lambda one: mine[one].tokens_per_s)
    found = runs[f"{name}.ours"] = mine[key]
    speeds = (f"{one.rpartition('.')[2]} {run.tokens_per_s:,.0f}" for one, run in mine.items())
    note = f"of {', '.join(speeds)} tokens/s"
    ours = f"{name}.ours"
    yield context.row(f"{name}: the fastest is {key}", found.tokens_per_s, "tokens/s", note, key=f"{ours}.tokens_per_s")
    yield context.row(
        f"{name}: its loader wait",
        100 * found.measured.wait_share,
        "%",
        "of the timed steps",
        key=f"{ours}.loader_wait",
    )
    peak, flops = sheet_peak(context.device), context.facts.get(f"{name}.flops_a_step")
    if peak is not None and flops is not None:
        yield context.row(f"{name}: its MFU", 100 * flops / found.measured.step_s / peak, "%", key=f"{ours}.mfu")
    yield from beside(context, name, runs)
