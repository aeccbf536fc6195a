"""train: one round of training on the packs, in a process group of its own, with a live card."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from humanize import precisedelta

from sft_core.pins import PinnedRecipe
from sft_core.report.plots import by_step, loss_by_source, loss_curve
from sft_core.rounds import Rounds
from sft_core.search.deliver import build_delivered
from sft_core.search.job import RolloutSpec, SearchSpec
from sft_core.search.launch import CONVERSATIONS as OF_CONVERSATIONS
from sft_core.search.launch import build_rollout
from sft_core.sections import Training
from sft_core.store.stage import Build, Located, Needs, Part, Stage, Unresolved
from sft_core.store.store import Store
from sft_core.train import accelerator
from sft_core.train.job import ModelLoader, SelectionSpec, TokenizerLoader, TrainSpec
from sft_core.train.launch import START, build_trained, comes_true, join_training, node_environment
from sft_core.train.log_file import read_events
from steps.cards import chart, facts, heading, progress_bar, redraw, table
from steps.download import CONVERSATIONS
from steps.pack import PACKED, rows_to_pack
from steps.scoring import asked_of_answers, wants_conversation
from steps.selection import SELECTION

REFRESH_S = 3.0
STARTED_WITHIN_S = 7200.0  # the first node may have to upload the checkpoint that a phase starts from
# Of each logged event: title, key and how it is written.
LOGGED = (
    ("learning rate", "learning_rate", ".3g"),
    ("gradient norm", "grad_norm", ".3g"),
    ("tokens/s", "tokens_per_s", ",.0f"),
    ("trained tokens/s", "trained_tokens_per_s", ",.0f"),
)
LAST_EVENTS, RECENT = 10, 10  # log lines that the card's table shows, and by which the time to go is reckoned
DOCUMENTS = {
    "together": "together, apart from each other",
    "alone": "each in a forward of its own: together this model lets them see each other",
}
MEASURED = (("TFLOP/s a rank", "tflops_per_s", 3), ("MFU", "mfu", 3), ("memory, GiB", "memory_gib", 2))


def _section(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    phase, name = pinned.phase(part), pinned.phase_name(part)
    training = _training(pinned, part).model_dump(mode="json")
    del training["loss_scope"]  # in the tokens already
    if training["router_aux_loss_coef"] is None:
        del training["router_aux_loss_coef"]  # outputs that were trained before there was this key keep their keys
    job = {
        "model": _of_start(pinned, name, pinned.model_identity),
        "tokenizer": pinned.tokenizer_identity,
        "chat_template": pinned.pins["template"],
        "training": training,
        "sources": phase.sources,
    }
    if (selection := _selection_spec(pinned, name)) is not None:
        job["selection"] = dataclasses.asdict(selection)
    if (rollout := _rollout_spec(pinned, part)) is not None:
        job["rollout"] = rollout.identity
    return {"job": job, "round": part["round"]}


def _of_start(pinned: PinnedRecipe, phase: str, model: dict[str, Any]) -> dict[str, Any]:
    """How the phase loads the model that it starts from: of a later phase without its weights, which are an input."""
    if pinned.phase_before(phase) is None:
        return model
    return {name: None if name in ("pin", "path", "revision", "config") else value for name, value in model.items()}


def _places(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    rollout, phase, name = _rollout_spec(pinned, part), pinned.phase(part), pinned.phase_name(part)
    spec = TrainSpec(
        rank_module=_rank_module(pinned, name),
        model=ModelLoader(**_of_start(pinned, name, pinned.model_loader)),
        tokenizer=TokenizerLoader(**pinned.tokenizer_loader),
        chat_template=pinned.template_text,
        training=_training(pinned, part),
        sources=phase.sources,
        selection=_selection_spec(pinned, name),
    )
    return {"job": spec if rollout is None else SearchSpec(spec, rollout)}


def _rank_module(pinned: PinnedRecipe, phase: str) -> str:
    """The module that each rank runs."""
    return "sft_core.train.main" if pinned.recipe.phases[phase].search is None else "sft_core.search.main"


def _training(pinned: PinnedRecipe, part: Part) -> Training:
    phase, name = pinned.phase(part), pinned.phase_name(part)
    if phase.search is None:
        return phase.training
    rollout = pinned.rounds[name].rollouts[part["round"]]
    return phase.training.model_copy(update={"num_train_epochs": rollout.epochs})


def _selection_spec(pinned: PinnedRecipe, phase: str) -> SelectionSpec | None:
    if (search := pinned.recipe.phases[phase].search) is not None:
        return SelectionSpec(1 / search.evaluations_per_epoch, keep_best=False)
    during = pinned.recipe.evaluation.during_training
    return SelectionSpec(during.every_epochs, during.keep_best) if during is not None else None


def _rollout_spec(pinned: PinnedRecipe, part: Part) -> RolloutSpec | None:
    """None without a search."""
    phase = pinned.phase(part)
    if (search := phase.search) is None:
        return None
    rounds = pinned.rounds[pinned.phase_name(part)]
    rollout, tasks = rounds.rollouts[part["round"]], phase.dataset_mixture.trained_sources
    repacks = search.needs.repacks and phase.packing.packing_strategy == "ffd"
    return RolloutSpec(
        search=search,
        tasks=tasks,
        sizes=dict(rounds.sizes) if search.needs.sizes else {},
        active=list(rollout.active),
        start=rollout.start,
        answers={task: asked_of_answers(pinned, task) for task in tasks} if search.score == "answers" else None,
        max_length=phase.packing.max_length if repacks else None,
    )


def _needs(pinned: PinnedRecipe, part: Part) -> Needs:
    phase, name = pinned.phase(part), pinned.phase_name(part)
    needs: Needs = {"packs": (PACKED, _packs_of(pinned, part)), **rows_to_pack(pinned, part)}
    if (before := pinned.phase_before(name)) is not None:
        needs[START] = checkpoint_of(pinned, before)
    if pinned.recipe.selection_rows(name) is not None:
        needs["selection"] = (SELECTION, pinned.part_of(name))
    if (search := phase.search) is not None and search.score == "answers":
        for task in phase.dataset_mixture.trained_sources:
            if wants_conversation(pinned, task):
                needs[f"{OF_CONVERSATIONS}{task}"] = (CONVERSATIONS, {"source": task})
    # A search decides by all that was measured before.
    return needs | {f"round:{number}": (TRAINED, {**part, "round": number}) for number in range(part["round"])}


def _packs_of(pinned: PinnedRecipe, part: Part) -> Part:
    """The part of PACKED that a round trains on."""
    phase, name = pinned.phase(part), pinned.phase_name(part)
    if phase.search is None:
        return pinned.part_of(name)
    rollout = pinned.rounds[name].rollouts[part["round"]]
    if rollout.rows is None and list(rollout.active) == phase.sources:
        return pinned.part_of(name)
    return pinned.part_of(name, rows=dict(rollout.rows or dict.fromkeys(rollout.active)))


def build(build: Build, *, job: TrainSpec | SearchSpec, round: int) -> dict[str, Any]:
    """Trains, in a process group of its own. Raises RuntimeError with the error of the rank that failed first."""
    if isinstance(job, SearchSpec):
        return build_rollout(build, job=job, round=round)
    return build_trained(build, job=job, round=round)


# The version stands for sft_core/train: raise it when a change there changes what is trained.
TRAINED = Stage(
    "trained",
    build,
    section=_section,
    places=_places,
    needs=_needs,
    version=3,
    resumable=True,
    verify_inputs=True,
)


def _weights(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    best = pinned.rounds[pinned.phase_name(part)].best
    if best is None:
        raise Unresolved("the search is not over")
    return {"evaluation": best.evaluation}


CHECKPOINT = Stage(
    "checkpoint",
    build_delivered,
    section=_weights,
    needs=lambda pinned, part: {"trained": (TRAINED, last_round(pinned, pinned.phase_name(part)))},
)


def checkpoint_of(pinned: PinnedRecipe, phase: str) -> tuple[Stage, Part]:
    """The output whose model/ a phase ends with: without a search that of its one round."""
    if pinned.recipe.phases[phase].search is None:
        return TRAINED, last_round(pinned, phase)
    return CHECKPOINT, pinned.part_of(phase)


def last_round(pinned: PinnedRecipe, phase: str) -> Part:
    """The round whose weights a phase ends with; while its search is not over, the last that is known."""
    rounds = pinned.rounds.get(phase, Rounds())
    return pinned.part_of(phase, round=rounds.best.round if rounds.best else max(0, len(rounds.rollouts) - 1))


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


def _times(lines: list[dict[str, Any]]) -> dict[str, str]:
    """The time so far, and the time to go; nothing where the log has no seconds."""
    last, seconds = lines[-1], sum(event.get("seconds", 0.0) for event in lines)
    if not seconds:
        return {}
    times = {"time so far": _duration(seconds)}
    num_left, between = last["of"] - last["step"], last["step"] - (lines[-2]["step"] if len(lines) > 1 else 0)
    if num_left >= between:  # else no further line will be logged
        # By the latest events: the first ones load and compile.
        steps = last["step"] - lines[-RECENT - 1]["step"] if len(lines) > RECENT else last["step"]
        times["time to go"] = _duration(sum(event.get("seconds", 0.0) for event in lines[-RECENT:]) / steps * num_left)
    return times


def _state(lines: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    last = lines[-1]
    speeds = [event["tokens_per_s"] for event in lines[1:] if "tokens_per_s" in event] or [
        last.get("tokens_per_s", 0.0)
    ]
    shown = {
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


def _of_sources(event: dict[str, Any]) -> dict[str, float]:
    return {name.removeprefix("loss/"): value for name, value in event.items() if name.startswith("loss/")}


def _first_to_last(losses: list[dict[str, float]]) -> Any:
    by_source: dict[str, list[float]] = {}
    for of_event in losses:
        for source, loss in of_event.items():
            by_source.setdefault(source, []).append(loss)
    rows = [(source, curve[0], min(curve), curve[-1]) for source, curve in by_source.items()]
    return table(("source", "first loss", "lowest", "last"), rows)


def _selection(measured: list[dict[str, Any]]) -> list[Any]:
    """The loss on held-out rows, where it is measured while training goes on."""
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
        accelerator.check_machine(pinned.recipe.for_phase(pinned.phase_name(part)))


def meet_other_nodes(parallel: Any, attempt: str) -> None:
    """Sets the environment by which this task's ranks find those of the gang's other tasks.

    parallel: Metaflow's current.parallel. attempt: names this try of this run. The port follows from it, so that the
    ranks meet no leftover of another try.
    """
    port = 20_000 + zlib.crc32(attempt.encode()) % 10_000
    nodes = {"node": parallel.node_index, "num_nodes": parallel.num_nodes}
    os.environ.update(node_environment(**nodes, address=parallel.main_ip, port=port))


def join_round(store: Store, pinned: PinnedRecipe, part: Part) -> str:
    """Joins the training of the gang's first task, and returns the address of the output that the first task stores."""
    # The first node makes the checkpoint that a phase starts from; without it the round has no key.
    if not comes_true(lambda: _located(store, pinned, part).ref is not None, STARTED_WITHIN_S):
        raise FileNotFoundError(f"{part}: the first node did not make the checkpoint that it starts from")
    located = _located(store, pinned, part)
    assert located.ref is not None
    join_training(
        store.scratch(located.ref),
        pinned.recipe.runtime,
        _rank_module(pinned, pinned.phase_name(part)),
        lambda: _located(store, pinned, part).status == "hit",
    )
    return str(located.ref)


def _located(store: Store, pinned: PinnedRecipe, part: Part) -> Located:
    store.refresh()
    return store.locate(TRAINED, pinned, part)


@contextlib.contextmanager
def live_card(store: Store, pinned: PinnedRecipe, part: Part, live: Any) -> Iterator[None]:
    """Redraws the task's card from the training log while the body runs. live: Metaflow's current.card."""
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
