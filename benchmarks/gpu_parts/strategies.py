"""h: every other strategy on one rank beside ddp: the same losses, their speed and their memory.

On one rank nothing is shared. ZeRO trains bf16 weights, with fp32 masters in its optimizer; ddp and fsdp2 train fp32
weights under autocast, which converts each weight in each forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_parts.jobs import Work
from benchmarks.gpu_parts.process import Ahead, alone_of_its_group
from benchmarks.gpu_parts.rows import Case, Context, Row, cases
from benchmarks.gpu_parts.shapes import config_of, documents, tokens
from sft_core.recipe.rank_strategies import DEFAULT, STRATEGIES
from sft_core.train.job import write_job
from sft_core.train.launch import variables

ALIKE = 0.02  # of a loss: bf16 weights round otherwise than autocast over fp32 ones
MOST_S = 60.0


def run(context: Context) -> Iterator[Row]:
    log = context.folder / "ranks.log"
    for name in STRATEGIES:
        if name not in names_of(context):
            yield context.row(name, note="not to be had: accelerate has it on accelerators alone")
    processes: dict[str, Ahead] = {}
    try:
        yield from cases(context, listed(context, processes))
    finally:
        for process in processes.values():
            process.end()
        if log.exists():
            print(log.read_text())  # into this part's own


def names_of(context: Context) -> list[str]:
    """Of the strategies that this device can have, the one first beside which the others are told."""
    return [
        name
        for name in [DEFAULT, *(name for name in STRATEGIES if name != DEFAULT)]
        if context.on_gpu or not STRATEGIES[name].needs_gpu
    ]


def listed(context: Context, processes: dict[str, Ahead] | None = None) -> list[Case]:
    """processes: gets the rank of each, which whoever calls ends."""
    started: dict[str, Ahead] = {} if processes is None else processes
    names = names_of(context)
    found: dict[str, dict[str, Any]] = {}
    at_a_time = len(names) if context.on_gpu else 2  # they import meanwhile

    def case(place: int, name: str) -> Case:
        def rows() -> Iterator[Row]:
            for ahead in names[place : place + at_a_time]:
                if ahead not in started:
                    started[ahead] = start(context, ahead)
            yield from strategy_rows(context, name, started[name], found)

        return Case(name, 13 if place == 0 else 6, rows, is_core=True)  # for the first one all must be imported

    return [case(place, name) for place, name in enumerate(names)]


def start(context: Context, name: str) -> Ahead:
    settings = variables(context.folder, num_threads=2, distributed=name)
    changed = {key: value for key, value in settings.items() if key.startswith(("ACCELERATE_", "FSDP_"))}
    command = ["--task", "strategy_steps", "--device", context.device]
    return Ahead(command, log=context.folder / "ranks.log", environment=changed | alone_of_its_group())


def strategy_rows(context: Context, name: str, process: Ahead, found: dict[str, dict[str, Any]]) -> Iterator[Row]:
    size, timed = tokens(8192, context.device), 4 if context.on_gpu else 1
    work = Work(
        config_of("360m", context.device),
        documents(size, size // 2),
        steps=2 * timed + 1,
        training={"learning_rate": 1e-4},
        runtime={"logging_steps": 1, "distributed": name},
    )
    job = work.write(context.folder / name)
    order = {"job": str(write_job(job, job.out)), "warm": timed, "timed": timed}
    process.wait_until_ready(max(1.0, context.left()))
    (told,) = process.go(order, min(MOST_S, max(1.0, context.left())))
    found[name] = told
    how = "bf16 weights, fp32 masters in the optimizer" if STRATEGIES[name].master_weights else "under autocast"
    note = f"weights in {told['weights']}; {how}"
    yield context.row(
        f"{name}: tokens/s", work.tokens_a_step / told["step_s"], "tokens/s", note, key=f"{name}.tokens_per_s"
    )
    yield context.row(
        f"{name}: peak memory",
        told["peak_gib"],
        "GiB",
        f"estimated {work.estimated_gib():.1f} GiB",
        key=f"{name}.peak_gib",
    )
    if name != DEFAULT and DEFAULT in found:
        yield beside_row(context, name, told, found[DEFAULT])


def beside_row(context: Context, name: str, told: dict[str, Any], expected: dict[str, Any]) -> Row:
    """expected: what the default strategy told."""
    differs = max(abs(one / other - 1) for one, other in zip(told["losses"], expected["losses"], strict=True))
    speed = expected["step_s"] / told["step_s"]
    note = f"over {len(told['losses'])} steps; {speed:.2f} x {DEFAULT}'s speed"
    return context.row(f"{name}: losses beside {DEFAULT}'s", differs, "", note, passed=differs < ALIKE)
