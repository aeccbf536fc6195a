"""c: steps of SmolLM3-3B's shape: ours, TRL packed and a bare loop, one after another over the same packs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from benchmarks.gpu_parts.jobs import Work
from benchmarks.gpu_parts.meter import matmul_ceiling, sheet_peak
from benchmarks.gpu_parts.packed import attentions
from benchmarks.gpu_parts.rows import Case, Context, Row, cases
from benchmarks.gpu_parts.shapes import config_of, documents, tokens, two_unequal
from benchmarks.gpu_parts.sides import Run, Side, bare, ours, trl, with_checkpointing_where_needed

ROOM = 0.93  # of the device's memory, that an estimate may take before layers are checkpointed

HELD_GIB = 0.5  # by a case that is over: more than that is told, for it is in the peak


def run(context: Context) -> Iterator[Row]:
    check_shape()
    yield from cases(context, listed(context))


def listed(context: Context) -> list[Case]:
    """What goals are set for, and the bare loop over long packs, before the rest."""
    device = context.device
    size, long = tokens(8192, device), tokens(65536, device)
    packs = {
        "3b.8k": (two_unequal(size), 3 if context.on_gpu else 2),
        "3b.64k_of_5k": (documents(long, tokens(5000, device)), 1),
        "3b.64k_of_64k": ([long], 1),
    }
    runs: dict[str, Run] = {}
    flash = attentions(context)["flash_attention_2"] is None
    own = "flash_attention_2" if flash else "sdpa"  # what a TRL user has; ours is lent to it as well

    def case(name: str, side: str, run: Side, seconds: float, *, is_core: bool = False, **settings: Any) -> Case:
        lengths, timed = packs[name]
        work = Work(config_of("3b", device), lengths, steps=2 * timed + 1)
        settings |= {"warm": timed, "timed": timed}
        rows = functools.partial(measured_rows, context, name, side, run, work, runs, settings)
        return Case(f"{name} {side}", seconds, rows, is_core)

    def besides(name: str) -> Case:
        return Case(f"{name} beside", 0, lambda: beside(context, name, runs))

    core, varlen = {"is_core": True}, {"attention": "varlen"}
    return [
        case("3b.8k", "ours", ours, 18, **core),
        case("3b.8k", "trl_varlen", trl, 12, **core, **varlen),
        besides("3b.8k")._replace(is_core=True),
        case("3b.64k_of_5k", "ours", ours, 20, **core),
        case("3b.64k_of_64k", "ours", ours, 36, **core),
        case("3b.64k_of_5k", "bare", bare, 20, **core),
        case("3b.8k", "trl", trl, 12, attention=own),
        besides("3b.8k"),
        case("3b.8k", "bare", bare, 10),
        case("3b.64k_of_5k", "trl_varlen", trl, 20, **varlen),
        besides("3b.64k_of_5k"),
        case("3b.64k_of_64k", "trl_varlen", trl, 36, **varlen),
        besides("3b.64k_of_64k"),
        case("3b.64k_of_64k", "bare", bare, 36),
    ]


def check_shape() -> None:
    """The config has what SmolLM3-3B has: 3.075 B parameters, tied, and every fourth layer without positions."""
    from sft_core.train.models.model import skeleton

    model = skeleton(path=None, revision=None, config=config_of("3b", "cuda"), trust_remote_code=False)
    assert model.num_parameters() == 3_075_098_624, f"found {model.num_parameters():,} parameters"
    assert model.config.tie_word_embeddings and model.config.no_rope_layers == [1, 1, 1, 0] * 9


def measured_rows(
    context: Context, name: str, side: str, run: Side, work: Work, runs: dict[str, Run], settings: dict[str, Any]
) -> Iterator[Row]:
    if context.on_gpu and work.estimated_gib() > ROOM * torch.cuda.get_device_properties(0).total_memory / 2**30:
        work = dataclasses.replace(work, checkpointing=True)
    held = torch.cuda.memory_allocated() / 2**30 if context.on_gpu else 0.0
    folder = context.folder / f"{name}-{side}"
    try:
        found, work, note = with_checkpointing_where_needed(run, work, folder, context.device, **settings)
    except torch.OutOfMemoryError:
        if run is ours:
            raise
        yield context.row(f"{name}.{side}", note="out of memory, also with gradient checkpointing")
        return
    runs[f"{name}.{side}"] = found
    note += "with gradient checkpointing" if work.checkpointing else "without gradient checkpointing"
    if held > HELD_GIB:
        note += f" ({held:.1f} GiB were held from before)"
    if "attention" in settings:
        note += f", {settings['attention']}"
    if found.flops_a_step is not None:
        context.facts[f"{name}.flops_a_step"] = found.flops_a_step
    yield from rows_of(context, f"{name}.{side}", found, work, note, context.facts.get(f"{name}.flops_a_step"))


def rows_of(context: Context, key: str, found: Run, work: Work, note: str, flops_a_step: float | None) -> Iterator[Row]:
    """flops_a_step: as our log counts them, for each side the same."""
    measured = found.measured

    def row(what: str, number: float | None, unit: str, note: str = "", name: str | None = None) -> Row:
        return context.row(f"{key}: {what}", number, unit, note, key=f"{key}.{name or what}")

    if found.logged_tokens_per_s is not None:
        note += f"; its log says {found.logged_tokens_per_s:,.0f}; documents {found.forward['documents']} by "
        note += f"{found.forward['told_by']}, {found.forward['packs_a_forward']} pack(s) a forward, "
        note += "fused head" if found.forward["fused_head"] else "plain head"
    step = f"{1e3 * measured.step_s:,.0f} ms a step of {found.tokens_a_step:,} tokens; "
    yield row("tokens/s", found.tokens_per_s, "tokens/s", step + note, "tokens_per_s")
    if flops_a_step is not None:
        flops = flops_a_step / measured.step_s
        ceiling = 1e12 * context.fact("ceiling_tflops", lambda: matmul_ceiling(context.device) / 1e12)
        by_ceiling = f"{flops / 1e12:,.0f} TFLOP/s; {100 * flops / ceiling:.1f} % of the measured ceiling"
        if (peak := sheet_peak(context.device)) is not None:
            yield row("MFU", 100 * flops / peak, "%", by_ceiling, "mfu")
        yield row("share of the measured ceiling", 100 * flops / ceiling, "%", "", "of_ceiling")
    estimated = work.estimated_gib()
    held = f"; {measured.reserved_gib:.1f} GiB reserved" if measured.reserved_gib is not None else ""
    yield row("peak memory", measured.peak_gib, "GiB", f"estimated {estimated:.1f} GiB{held}", "peak_gib")
    yield row("loader wait", 100 * measured.wait_share, "%", "of the timed steps", "loader_wait")
    if measured.syncs is not None:
        places = ", ".join(
            f"{n} x {place}" for place, n in sorted(measured.sync_places.items(), key=lambda p: -p[1])[:4]
        )
        yield row("synchronisations a step", measured.syncs, "", places, "syncs")
        if measured.idle_share is None:
            yield row("idle", None, "%", "the profiler sees no kernels on this machine")
        else:
            yield row("idle", 100 * measured.idle_share, "%", f"kernels run for {1e3 * (measured.busy_s or 0):,.0f} ms")


def beside(context: Context, name: str, runs: dict[str, Run]) -> Iterable[Row]:
    """Ours beside the fastest of TRL's runs so far: the speed, and the peak of memory."""
    mine = runs.get(f"{name}.ours")
    others = {key: run for key, run in runs.items() if key.startswith(f"{name}.trl")}
    if mine is None or not others:
        return
    best = max(others, key=lambda key: others[key].tokens_per_s)
    other, note = others[best], f"beside {best}"
    if mine.checkpointed != other.checkpointed:
        note += f"; {'ours' if mine.checkpointed else 'TRL'} alone needs gradient checkpointing"
    yield context.row(
        f"{name}: ours is x TRL packed", mine.tokens_per_s / other.tokens_per_s, "x", note, key=f"{name}.beside_trl"
    )
    if context.on_gpu:  # a process's peak on a CPU is that of all it did so far
        share = mine.measured.peak_gib / other.measured.peak_gib
        yield context.row(f"{name}: memory of ours / TRL's", share, "x", note, key=f"{name}.memory_beside_trl")
