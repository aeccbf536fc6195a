"""train: one round of training on the packs, in a process group of its own, with a live card."""

from __future__ import annotations

import contextlib
import os
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from humanize import precisedelta

from sft_core.pins import PinnedRecipe
from sft_core.report.plots import by_step, loss_by_source, loss_curve
from sft_core.search.peaks import TEST
from sft_core.search.strategies import CAPS
from sft_core.store.stage import Needs, Part, Stage
from sft_core.store.store import Store
from sft_core.train import accelerator
from sft_core.train.launch import among_nodes, build_trained, train_along
from sft_core.train.log_file import read_events
from steps.cards import chart, facts, heading, progress_bar, redraw, table
from steps.download import CONVERSATIONS
from steps.pack import PACKED, rows_to_pack
from steps.scoring import asked_of_answers, wants_conversation
from steps.selection import SELECTION

REFRESH_S = 3.0
# Of each logged event: title, key and how it is written.
LOGGED = (
    ("learning rate", "learning_rate", ".3g"),
    ("gradient norm", "grad_norm", ".3g"),
    ("tokens/s", "tokens_per_s", ",.0f"),
    ("trained tokens/s", "trained_tokens_per_s", ",.0f"),
)
LAST_EVENTS, RECENT = 10, 10  # events that are told one by one, and that tell how long the rest takes
DOCUMENTS = {
    "together": "together, apart from each other",
    "alone": "each in a forward of its own: together this model lets them see each other",
}
MEASURED = (("TFLOP/s a rank", "tflops_per_s", 3), ("MFU", "mfu", 3), ("memory, GiB", "memory_gib", 2))


def _section(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    training = pinned.recipe.training.model_dump(mode="json")
    del training["loss_scope"]  # in the tokens already
    if training["router_aux_loss_coef"] is None:
        del training["router_aux_loss_coef"]  # what was trained before there was this key stays what it is
    job = {
        "model": pinned.model_identity,
        "tokenizer": pinned.tokenizer_identity,
        "chat_template": pinned.pins["template"],
        "training": training,
        "sources": pinned.recipe.sources,
    }
    if (during := pinned.recipe.evaluation.during_training) is not None:
        job["selection"] = {"every_epochs": during.every_epochs, "keep_best": during.keep_best}
    if (search := pinned.recipe.search) is not None:
        rollout = pinned.rollouts[part["round"]]
        training["num_train_epochs"] = rollout.epochs
        job["selection"] = {"every_epochs": 1 / search.evaluations_per_epoch, "keep_best": False}
        job["rollout"] = {
            "search": {name: value for name, value in search.model_dump(mode="json").items() if name not in CAPS},
            "tasks": pinned.recipe.dataset_mixture.trained_sources,
            "sizes": dict(pinned.sizes) if search.strategy == "soft_sro" else {},
            "active": list(rollout.active),
            "start": None if rollout.start is None else rollout.start._asdict(),
        }
        if (search.strategy, search.preset) == ("msft", "robust"):
            job["rollout"]["test"] = TEST
        if search.score == "answers":
            job["rollout"]["answers"] = {task: asked_of_answers(pinned, task) for task in job["rollout"]["tasks"]}
        if search.strategy == "ies":
            packing = pinned.recipe.packing  # its rows are packed anew
            job["rollout"]["max_length"] = packing.max_length if packing.packing_strategy == "ffd" else None
    return {"job": job, "round": part["round"]}


def _places(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    job = _section(pinned, part)["job"]
    loaders = {"model": pinned.model_loader, "tokenizer": pinned.tokenizer_loader}
    return {"job": {**job, **loaders, "chat_template": pinned.template_text}}


def _needs(pinned: PinnedRecipe, part: Part) -> Needs:
    needs: Needs = {"packs": (PACKED, _packs_of(pinned, part)), **rows_to_pack(pinned)}
    if pinned.recipe.selection_rows is not None:
        needs["selection"] = (SELECTION, {})
    if (search := pinned.recipe.search) is not None and search.score == "answers":
        for task in pinned.recipe.dataset_mixture.trained_sources:
            if wants_conversation(pinned, task):
                needs[f"conversations:{task}"] = (CONVERSATIONS, {"source": task})
    # Decisions rest on all that was measured before.
    return needs | {f"round:{number}": (TRAINED, {"round": number}) for number in range(part["round"])}


def _packs_of(pinned: PinnedRecipe, part: Part) -> Part:
    """The part of PACKED that a round trains on."""
    if pinned.recipe.search is None:
        return {}
    rollout = pinned.rollouts[part["round"]]
    if rollout.rows is not None:
        return {"active": ",".join(f"{task}:{num_rows}" for task, num_rows in rollout.rows.items())}
    return {} if list(rollout.active) == pinned.recipe.sources else {"active": ",".join(rollout.active)}


# The version stands for sft_core/train: raise it when a change there changes what is trained.
TRAINED = Stage(
    "trained",
    build_trained,
    section=_section,
    places=_places,
    needs=_needs,
    version=3,
    resumable=True,
    verify_inputs=True,
)


def events(folder: Path, name: str = "log.jsonl") -> list[dict[str, Any]]:
    """What a training has written down so far."""
    return read_events(folder / "logs" / name)


def card(folder: Path) -> list[Any]:
    """The training so far, from its logs."""
    seen = events(folder)
    if not seen:
        return facts("Training", {"state": "starting"})
    losses = [_of_sources(event) for event in seen]
    components = [
        heading("Training"),
        progress_bar(seen[-1]["step"], seen[-1]["of"], label="optimizer steps"),
        table(("", ""), list(_state(seen, folder).items())),
        heading("Loss"),
        chart(loss_curve(seen)),
    ]
    if any(len(by_source) > 1 for by_source in losses):
        components += [chart(loss_by_source(seen, losses)), _first_to_last(losses)]
    if measures := {title: key for title, key, _ in LOGGED if any(key in event for event in seen)}:
        components += [heading("Speed and optimizer"), chart(by_step(seen, measures))]
    shown = [column for column in LOGGED if column[0] in measures]
    last = [
        (event["step"], event["loss"], *(_number(event, key, form) for _, key, form in shown))
        for event in seen[-LAST_EVENTS:]
    ]
    components += [heading("Last events"), table(("step", "loss", *(title for title, _, _ in shown)), last)]
    return [*components, *_selection(events(folder, "selection.jsonl"))]


def _times(seen: list[dict[str, Any]]) -> dict[str, str]:
    """How long it took so far, and the rest will; nothing of a log that does not say so."""
    last, seconds = seen[-1], sum(event.get("seconds", 0.0) for event in seen)
    if not seconds:
        return {}
    told = {"time so far": _duration(seconds)}
    left, between = last["of"] - last["step"], last["step"] - (seen[-2]["step"] if len(seen) > 1 else 0)
    if left >= between:  # else nothing more will be logged
        # By the latest events: the first ones load and compile.
        steps = last["step"] - seen[-RECENT - 1]["step"] if len(seen) > RECENT else last["step"]
        told["time to go"] = _duration(sum(event.get("seconds", 0.0) for event in seen[-RECENT:]) / steps * left)
    return told


def _state(seen: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    last = seen[-1]
    speeds = [event["tokens_per_s"] for event in seen[1:] if "tokens_per_s" in event] or [last.get("tokens_per_s", 0.0)]
    shown = {
        "step": f"{last['step']:,} of {last['of']:,}",
        **_times(seen),
        "loss": f"{last['loss']:.4f}",
        "gradient norm": _number(last, "grad_norm", ".3g"),
        "learning rate": _number(last, "learning_rate", ".3g"),
        "tokens/s, mean": f"{sum(speeds) / len(speeds):,.0f}",
        **{name: f"{last[key]:.{digits}f}" for name, key, digits in MEASURED if key in last},
    }
    for told in events(folder, "forward.jsonl")[-1:]:
        shown["attention"] = told["attention"]
        shown["documents of a pack"] = DOCUMENTS[told["documents"]]
        shown["packs a forward"] = told["packs_a_forward"]
    for told in events(folder, "balance.jsonl"):
        if told["ranks"] > 1:
            place = f"{told['ranks']} ranks, {told['packs_a_step']} packs a step"
            shown["slowest rank / mean rank, FLOPs"] = f"{told['slowest_over_mean']:.4f} ({place})"
    return shown


def _of_sources(event: dict[str, Any]) -> dict[str, float]:
    return {name.removeprefix("loss/"): value for name, value in event.items() if name.startswith("loss/")}


def _first_to_last(losses: list[dict[str, float]]) -> Any:
    by_source: dict[str, list[float]] = {}
    for one in losses:
        for source, loss in one.items():
            by_source.setdefault(source, []).append(loss)
    rows = [(source, found[0], min(found), found[-1]) for source, found in by_source.items()]
    return table(("source", "first loss", "lowest", "last"), rows)


def _selection(measured: list[dict[str, Any]]) -> list[Any]:
    """Loss on held-out rows, where it is measured while training goes on."""
    if not measured:
        return []
    best = min(measured[1:] or measured, key=lambda event: event["loss"])
    lowest = {"lowest mean over sources": f"{best['loss']:.4f} at step {best['step']:,}"}
    losses = [event["losses"] for event in measured]
    components = [*facts("Loss on the selection split", lowest), chart(loss_curve(measured))]
    if len(losses[-1]) > 1:
        components.append(chart(loss_by_source(measured, losses)))
    return [*components, _first_to_last(losses)]


def _number(event: dict[str, Any], key: str, form: str) -> str:
    return f"{event[key]:{form}}" if key in event else "-"


def _duration(seconds: float) -> str:
    return precisedelta(seconds, minimum_unit="seconds" if seconds < 120 else "minutes", format="%.0f")


def check_machine(store: Store, pinned: PinnedRecipe, part: Part) -> None:
    """Raises ValueError for what this machine cannot train. On a cluster only the task itself knows its machine."""
    if store.locate(TRAINED, pinned, part).status != "hit":
        accelerator.check_machine(pinned.recipe)


def meet_other_nodes(parallel: Any, attempt: str) -> None:
    """Tells the ranks of this task where those of the gang's other tasks are. parallel: Metaflow's current.parallel.

    attempt: names this try of this run. It gives the port, so that what is left of another try is not met.
    """
    port = 20_000 + zlib.crc32(attempt.encode()) % 10_000
    nodes = {"node": parallel.node_index, "num_nodes": parallel.num_nodes}
    os.environ.update(among_nodes(**nodes, address=parallel.main_ip, port=port))


def along(store: Store, pinned: PinnedRecipe, part: Part) -> str:
    """Trains along with the gang's first task; the address of what that one stores."""
    located = store.locate(TRAINED, pinned, part)
    assert located.ref is not None, "the packs were made before"
    train_along(
        store.scratch(located.ref),
        pinned.recipe.runtime,
        lambda: store.locate(TRAINED, pinned, part).status == "hit",
    )
    return str(located.ref)


@contextlib.contextmanager
def live_card(store: Store, pinned: PinnedRecipe, part: Part, live: Any) -> Iterator[None]:
    """Redraws the task's card from the training log while the body runs. live: Metaflow's current.card."""
    located = store.locate(TRAINED, pinned, part)
    ended = threading.Event()

    def follow_log() -> None:
        drawn = 0
        while not ended.wait(REFRESH_S):
            if located.ref is not None and len(seen := events(store.scratch(located.ref))) > drawn:
                drawn = len(seen)
                redraw(live, card(store.scratch(located.ref)))

    thread = threading.Thread(target=follow_log, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        live.clear()
