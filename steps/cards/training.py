"""The card of train, drawn from the training log while training goes on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from humanize import precisedelta

from sft_core.pins.pinned import PinnedRecipe
from sft_core.report.plots import by_step, loss_by_source, loss_curve
from sft_core.store.stage import Part
from sft_core.store.store import Store
from sft_core.train.log_file import read_events
from steps.cards.pieces import chart, facts, heading, progress_bar, redraw, table
from steps.train import TRAINED

REFRESH_S = 3.0


# Measures of a logged event: title, key, format.
LOGGED = (
    ("learning rate", "learning_rate", ".3g"),
    ("gradient norm", "grad_norm", ".3g"),
    ("tokens/s", "tokens_per_s", ",.0f"),
    ("trained tokens/s", "trained_tokens_per_s", ",.0f"),
)


LAST_EVENTS, RECENT = 10, 10  # log lines in the card's table, and log lines from which the time to go is computed


DOCUMENTS = {
    "together": "together, apart from each other",
    "alone": "each in a forward of its own: together this model lets them see each other",
}


MEASURED = (("TFLOP/s a rank", "tflops_per_s", 3), ("MFU", "mfu", 3), ("memory, GiB", "memory_gib", 2))


def events(folder: Path, name: str = "log.jsonl") -> list[dict[str, Any]]:
    """The events in a log of a training so far."""
    return read_events(folder / "logs" / name)


def card(folder: Path) -> list[Any]:
    """The training so far, from its logs."""
    lines = events(folder)
    if not lines:
        return facts("Training", {"state": "starting"})
    losses = [_of_sources(event) for event in lines]
    components = [
        heading("Training"),
        progress_bar(lines[-1]["step"], lines[-1]["of"], label="optimizer steps"),
        table(("", ""), list(_state(lines, folder).items())),
        heading("Loss"),
        chart(loss_curve(lines)),
    ]
    if any(len(by_source) > 1 for by_source in losses):
        components += [chart(loss_by_source(lines, losses)), _first_to_last(losses)]
    if measures := {title: key for title, key, _ in LOGGED if any(key in event for event in lines)}:
        components += [heading("Speed and optimizer"), chart(by_step(lines, measures))]
    shown = [column for column in LOGGED if column[0] in measures]
    last = [
        (event["step"], event["loss"], *(_number(event, key, form) for _, key, form in shown))
        for event in lines[-LAST_EVENTS:]
    ]
    components += [heading("Last events"), table(("step", "loss", *(title for title, _, _ in shown)), last)]
    return [*components, *_selection(events(folder, "selection.jsonl"))]


def _times(lines: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """The time so far and the time to go; nothing for a log without seconds."""
    last, seconds = lines[-1], sum(event.get("seconds", 0.0) for event in lines)
    if not seconds:
        return {}
    times = {"time so far": _duration(seconds)}
    num_left, between = last["of"] - last["step"], last["step"] - (lines[-2]["step"] if len(lines) > 1 else 0)
    if num_left >= between:  # otherwise no further line comes, and the card would promise time to go for ever
        # Use recent events: the first ones load and compile.
        steps = last["step"] - lines[-RECENT - 1]["step"] if len(lines) > RECENT else last["step"]
        times["time to go"] = _duration(sum(event.get("seconds", 0.0) for event in lines[-RECENT:]) / steps * num_left)
    return times


def _state(lines: Sequence[Mapping[str, float]], folder: Path) -> dict[str, object]:
    last = lines[-1]
    speeds = [event["tokens_per_s"] for event in lines[1:] if "tokens_per_s" in event] or [
        last.get("tokens_per_s", 0.0)
    ]
    shown: dict[str, object] = {
        "step": f"{last['step']:,} of {last['of']:,}",
        **_times(lines),
        "loss": f"{last['loss']:.4f}",
        "gradient norm": _number(last, "grad_norm", ".3g"),
        "learning rate": _number(last, "learning_rate", ".3g"),
        "tokens/s, mean": f"{sum(speeds) / len(speeds):,.0f}",
        **{name: f"{last[key]:.{digits}f}" for name, key, digits in MEASURED if key in last},
    }
    for forward in events(folder, "forward.jsonl")[-1:]:
        shown["attention"] = forward["attention"]
        shown["documents of a pack"] = DOCUMENTS[forward["documents"]]
        shown["packs a forward"] = forward["packs_a_forward"]
    for balance in events(folder, "balance.jsonl"):
        if balance["ranks"] > 1:
            place = f"{balance['ranks']} ranks, {balance['packs_a_step']} packs a step"
            shown["slowest rank / mean rank, FLOPs"] = f"{balance['slowest_over_mean']:.4f} ({place})"
    return shown


def _of_sources(event: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix("loss/"): value for name, value in event.items() if name.startswith("loss/")}


def _first_to_last(losses: list[dict[str, float]]) -> Any:
    by_source: dict[str, list[float]] = {}
    for of_event in losses:
        for source, loss in of_event.items():
            by_source.setdefault(source, []).append(loss)
    rows = [(source, curve[0], min(curve), curve[-1]) for source, curve in by_source.items()]
    return table(("source", "first loss", "lowest", "last"), rows)


def _selection(measured: list[dict[str, Any]]) -> list[Any]:
    """The loss on the selection split during training; nothing where it is not measured."""
    if not measured:
        return []
    best = min(measured[1:] or measured, key=lambda event: event["loss"])
    lowest = {"lowest mean over sources": f"{best['loss']:.4f} at step {best['step']:,}"}
    losses = [event["losses"] for event in measured]
    components = [*facts("Loss on the selection split", lowest), chart(loss_curve(measured))]
    if len(losses[-1]) > 1:
        components.append(chart(loss_by_source(measured, losses)))
    return [*components, _first_to_last(losses)]


def _number(event: Mapping[str, float], key: str, form: str) -> str:
    return f"{event[key]:{form}}" if key in event else "-"


def _duration(seconds: float) -> str:
    return precisedelta(seconds, minimum_unit="seconds" if seconds < 120 else "minutes", format="%.0f")


@contextlib.contextmanager
def live_card(store: Store, pinned: PinnedRecipe, part: Part, live: Any) -> Iterator[None]:
    """Redraws the task's card from the training log while the body runs, and clears it at the end.

    live: Metaflow's current.card.
    """
    located = store.locate(TRAINED, pinned, part)
    ended = threading.Event()

    def follow_log() -> None:
        drawn = 0
        while not ended.wait(REFRESH_S):
            if located.ref is not None and len(lines := events(store.scratch(located.ref))) > drawn:
                drawn = len(lines)
                redraw(live, card(store.scratch(located.ref)))

    thread = threading.Thread(target=follow_log, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        live.clear()
