"""The way of one row: its place in the source, its rendered texts, and the packs and steps that trained it."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import pyarrow.compute as pc

from sft_core.data.packing.balance import pack_costs
from sft_core.data.packing.over_long import windows_of
from sft_core.data.packing.plan import PackPlan
from sft_core.data.shards.parallel import shard_folders
from sft_core.data.shards.token_shards import read_index, read_windows
from sft_core.data.sources import splits
from sft_core.parquet import read_table
from sft_core.store.ref import Ref
from sft_core.store.store import Store
from steps.tokenize import INDEX

if TYPE_CHECKING:
    from rich.tree import Tree

    from steps.cli.lineage import Lineage

PACKS_SHOWN = 8


class Text(TypedDict):
    """A training row that the conversation was rendered to."""

    sha256: str
    characters: int


class TokenRow(TypedDict):
    """row: its number, as `sft show --row` counts."""

    row: int
    shard: int
    num_tokens: int
    num_trained: int


class InPacks(TypedDict):
    """A document for each entry of packs and num_tokens. steps: by training; None where they are not known."""

    packed: str
    packs: list[int]
    num_tokens: list[int]
    steps: dict[str, list[int] | None]


class Journey(TypedDict):
    """conversations, rendered and tokens are addresses (stage/key), or None for an output that is not there."""

    row_id: str
    source: str
    conversations: str
    where: list[str]
    prompt_hash: int
    split: str | None
    rendered: str | None
    texts: list[Text]
    tokens: str | None
    rows: list[TokenRow]
    packs: list[InPacks]


def journeys(store: Store, lineage: Lineage, row_id: str) -> list[Journey]:
    """One for each source of the lineage that holds the row. Raises ValueError when none does."""
    sources = [ref for ref, manifest in lineage.manifests.items() if ref.stage == "conversations" and manifest]
    of_sources = [_journey(store, lineage, ref, row_id) for ref in sources]
    holding = [journey for journey in of_sources if journey is not None]
    if not holding:
        names = ", ".join(lineage.name(ref) for ref in sources) or "none"
        raise ValueError(
            f"--row: found {row_id!r}; no source that led to {lineage.root} holds it (looked in: {names}). A row_id is "
            "that of conversations.parquet or of a task's rows.parquet"
        )
    return holding


def _journey(store: Store, lineage: Lineage, conversations: Ref, row_id: str) -> Journey | None:
    with store.open(conversations, "conversations.parquet") as file:
        table = read_table(file, ["where", "row_id", "prompt_hash"], pc.field("row_id") == row_id)
    if len(table) == 0:
        return None
    source = lineage.name(conversations)
    rendered, tokens = (_of_source(lineage, stage, source) for stage in ("rendered", "tokens"))
    journey: Journey = {
        "row_id": row_id,
        "source": source,
        "conversations": str(conversations),
        "where": table["where"].to_pylist(),
        "prompt_hash": table["prompt_hash"][0].as_py(),
        "split": None,
        "rendered": str(rendered) if rendered else None,
        "texts": _texts(store, rendered, row_id) if rendered else [],
        "tokens": str(tokens) if tokens else None,
        "rows": _rows(store, tokens, row_id) if tokens else [],
        "packs": [],
    }
    mixture = next((ref for ref, manifest in lineage.manifests.items() if ref.stage == "mixture" and manifest), None)
    if mixture is not None:
        section = _section(lineage, mixture)
        shares = {name: section[name] for name in ("selection_share", "report_share")}
        assigned = splits.assign(np.array([journey["prompt_hash"]], dtype=np.uint64), **shares)
        journey["split"] = splits.NAMES[int(assigned[0])]
    packed = [ref for ref, manifest in lineage.manifests.items() if ref.stage == "packed" and manifest]
    journey["packs"] = [_in_packs(store, lineage, ref, source, journey["rows"]) for ref in packed if tokens]
    return journey


def _of_source(lineage: Lineage, stage: str, source: str) -> Ref | None:
    return next(
        (
            ref
            for ref, manifest in lineage.manifests.items()
            if ref.stage == stage and manifest and manifest["identity"]["part"].get("source") == source
        ),
        None,
    )


def _section(lineage: Lineage, ref: Ref) -> dict[str, Any]:
    manifest = lineage.manifests[ref]
    assert manifest is not None, "the output is in the store"
    return manifest["identity"]["section"]


def _texts(store: Store, rendered: Ref, row_id: str) -> list[Text]:
    is_it = pc.field("row_id") == row_id
    rendered_texts: list[Text] = []
    for shard in shard_folders(store.path(rendered)):
        path = shard / "rendered.parquet"
        texts = read_table(path, ["row_id", "text"], is_it)["text"].to_pylist()
        rendered_texts += [
            {"sha256": hashlib.sha256(text.encode()).hexdigest(), "characters": len(text)} for text in texts
        ]
    return rendered_texts


def _rows(store: Store, tokens: Ref, row_id: str) -> list[TokenRow]:
    rows: list[TokenRow] = []
    first = 0
    folder = store.path(tokens, *INDEX)
    for shard in range(len(shard_folders(folder))):
        index = read_index(folder, ["row_id", "num_tokens", "num_trained"], shards=[shard])
        for place in np.flatnonzero(index["row_id"].to_numpy(zero_copy_only=False) == row_id).tolist():
            num_tokens, num_trained = (index[name][place].as_py() for name in ("num_tokens", "num_trained"))
            rows.append({"row": first + place, "shard": shard, "num_tokens": num_tokens, "num_trained": num_trained})
        first += len(index)
    return rows


def _in_packs(store: Store, lineage: Lineage, packed: Ref, source: str, rows: list[TokenRow]) -> InPacks:
    plan, inputs = PackPlan.read(store.path(packed)), lineage.inputs(packed)
    numbers = [row["row"] for row in rows]
    if (windows := inputs.get(windows_of(source))) is not None:
        tokens = store.path(inputs[source], *INDEX)
        cut = read_windows(tokens, store.path(windows))
        numbers += (len(read_index(tokens, ["num_tokens"])) + np.flatnonzero(np.isin(cut.of_row, numbers))).tolist()
    is_it = (plan.source == _section(lineage, packed)["sources"].index(source)) & np.isin(plan.row, numbers)
    documents = np.flatnonzero(is_it)
    packs = (np.searchsorted(plan.offsets, documents, side="right") - 1).tolist()
    trained = [ref for ref in lineage.manifests if ref.stage == "trained" and packed in lineage.inputs(ref).values()]
    return {
        "packed": str(packed),
        "packs": packs,
        "num_tokens": plan.num_tokens[documents].tolist(),
        "steps": {str(ref): steps_of(store, lineage, ref, plan, packs) for ref in trained},
    }


def steps_of(store: Store, lineage: Lineage, trained: Ref, plan: PackPlan, packs: list[int]) -> list[int] | None:
    """Optimizer steps, from 1, that trained on one of the packs; None where they cannot be reconstructed.

    With added tokens the saved model is larger than the one whose size decided the order of packs. A roll-out that
    ended early did not take all steps of its schedule.
    """
    from sft_core.train.models.model import skeleton
    from sft_core.train.schedule import order_coefficients, step_packs

    section, manifest = _section(lineage, trained), lineage.manifests[trained]
    job = section["job"]
    if manifest is None or job["tokenizer"]["add_special_tokens"] or "model/config.json" not in manifest["files"]:
        return None
    with store.open(trained, "logs/log.jsonl") as file:
        last = json.loads(file.read().splitlines()[-1])
    if last["step"] < last["of"]:
        return None
    folder = str(store.path(trained, "model/config.json") / "model")
    linear, quadratic = order_coefficients(skeleton(path=folder, revision=None, config=None, trust_remote_code=False))
    schedule = step_packs(
        pack_costs(plan.num_tokens, plan.offsets, linear=linear, quadratic=quadratic),
        global_batch_size=job["training"]["global_batch_size"],
        num_epochs=job["training"]["num_train_epochs"],
        max_steps=job["training"]["max_steps"],
        seed=job["training"]["seed"] + section["round"],
    )
    return (np.flatnonzero(np.isin(schedule, packs).any(axis=1)) + 1).tolist()


def as_tree(journey: Journey) -> Tree:
    from rich.tree import Tree

    tree = Tree(f"row {journey['row_id']}  {journey['source']}", guide_style="dim", highlight=False)
    tree.add(f"source: {', '.join(journey['where'])}  ({journey['conversations']})")
    split = f"prompt {journey['prompt_hash']:016x}" + (f", in the {journey['split']} split" if journey["split"] else "")
    tree.add(split)
    for text in journey["texts"]:
        tree.add(f"text: sha256 {text['sha256'][:16]}, {text['characters']:,} characters  ({journey['rendered']})")
    for row in journey["rows"]:
        place = f"row {row['row']} in shard {row['shard']}"
        tree.add(
            f"tokens: {place}, {row['num_tokens']:,} of them, {row['num_trained']:,} trained  ({journey['tokens']})"
        )
    for packed in journey["packs"]:
        packs = _some(packed["packs"])
        branch = tree.add(f"packs: {packs or 'none, it is not trained on'}  ({packed['packed']})")
        for trained, steps in packed["steps"].items():
            numbers = "not known" if steps is None else _some(steps) or "none"
            branch.add(f"steps: {numbers}  ({trained})")
    return tree


def _some(numbers: list[int]) -> str:
    more = f", ... ({len(numbers)})" if len(numbers) > PACKS_SHOWN else ""
    return ", ".join(map(str, numbers[:PACKS_SHOWN])) + more
