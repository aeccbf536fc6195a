"""evaluate: base and tuned model on one task, on the same rows by the same code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.parquet as pq

from sft_core.data import splits
from sft_core.data.rejects import Rejected
from sft_core.data.sources import accept, list_files, read_files
from sft_core.evaluate.rows import read_rows
from sft_core.evaluate.tasks import build_evaluated
from sft_core.pins import PinnedRecipe
from sft_core.store import Needs, Part, Ref, Stage, Store
from steps import deliver
from steps.cards import facts, table
from steps.download import CONVERSATIONS
from steps.tokenize import TOKENS

MODELS = ("base", "tuned")
MAX_SCANNED_BYTES = 256 * 2**20  # larger local sources are counted once they are downloaded


def _section(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    recipe = pinned.recipe
    return {
        "model": pinned.model_identity if part["model"] == "base" else None,
        "tokenizer": pinned.tokenizer_identity,
        "attn_implementation": recipe.model.attn_implementation,
        "bf16": recipe.training.bf16,
        "seed": recipe.training.seed,
        "selection_share": recipe.dataset_mixture.selection_share,
        "report_share": recipe.dataset_mixture.report_share,
        "max_rows": recipe.evaluation.max_rows,
        "max_length": recipe.packing.max_length,
        "smoke": recipe.limit is not None,
        "max_new_tokens": recipe.evaluation.max_new_tokens_by_task.get(part["task"], recipe.evaluation.max_new_tokens),
    }


def _needs(pinned: PinnedRecipe, part: Part) -> Needs:
    tokens: Needs = {"tokens": (TOKENS, {"source": part["task"]})}
    return tokens if part["model"] == "base" else {**tokens, "trained": deliver.delivered(pinned)}


# The version stands for sft_core/evaluate: raise it when a change there changes a score.
EVALUATED = Stage(
    "evaluated",
    build_evaluated,
    section=_section,
    places=lambda pinned, part: {
        "model": pinned.model_loader if part["model"] == "base" else None,
        "tokenizer": pinned.tokenizer_loader,
    },
    needs=_needs,
    version=2,
    verify_inputs=True,
)


def card(store: Store, refs: dict[str, Ref]) -> list[Any]:
    """The task's scores, and some of its rows with what was wanted and what both models wrote."""
    manifests = {model: store.manifest(ref) for model, ref in refs.items()}
    scores = {
        (model, score["metric"]): f"{score['value']:.4f}" + (f" ± {score['stderr']:.4f}" if score["stderr"] else "")
        for model, manifest in manifests.items()
        for score in manifest["counts"]["scores"]
    }
    metrics = [score["metric"] for score in manifests["tuned"]["counts"]["scores"]]
    shown: dict[str, Any] = {"rows": manifests["tuned"]["counts"]["rows"]}
    shown |= {f"{metric}: base → tuned": f"{scores['base', metric]} → {scores['tuned', metric]}" for metric in metrics}
    components = facts(f"Task {manifests['tuned']['identity']['part']['task']}", shown)
    rows = {model: read_rows(store.path(ref)).slice(0, 12).to_pylist() for model, ref in refs.items()}
    pairs = [
        (tuned["answer"], base["output"], tuned["output"], "yes" if tuned["correct"] else "no")
        for base, tuned in zip(rows["base"], rows["tuned"], strict=True)
        if tuned["answer"] is not None
    ]
    return [*components, *([table(("wanted", "base wrote", "tuned wrote", "right"), pairs)] if pairs else [])]


def count_report_prompts(store: Store, pinned: PinnedRecipe) -> dict[str, int | None]:
    """Unique report prompts of each task; None where a source is not here yet."""
    return {task: _count(store, pinned, task) for task in pinned.recipe.tasks}


def check_report_prompts(counts: dict[str, int | None], pinned: PinnedRecipe) -> None:
    """Raises ValueError for tasks whose scores would rest on too few rows. A smoke run scores what it has."""
    if pinned.recipe.limit:
        return
    minimum = pinned.recipe.evaluation.min_report_rows
    few = {task: count for task, count in counts.items() if count is not None and count < minimum}
    if few:
        found = ", ".join(f"{task} has {count}" for task, count in few.items())
        raise ValueError(
            f"evaluation.min_report_rows: found too few unique report prompts ({found}; at least {minimum} are "
            "needed); raise dataset_mixture.report_share, add data, leave the task out of evaluation.tasks, or "
            "lower evaluation.min_report_rows"
        )


def _count(store: Store, pinned: PinnedRecipe, task: str) -> int | None:
    mixture = pinned.recipe.dataset_mixture
    hashes = _prompt_hashes(store, pinned, task)
    if hashes is None:
        return None
    split = splits.assign(hashes, selection_share=mixture.selection_share, report_share=mixture.report_share)
    return len(np.unique(hashes[split == splits.REPORT]))


def _prompt_hashes(store: Store, pinned: PinnedRecipe, task: str) -> np.ndarray | None:
    located = store.locate(CONVERSATIONS, pinned, {"source": task})
    if located.status == "hit" and located.ref is not None:
        with store.open(located.ref, "conversations.parquet") as file:
            return pq.read_table(file, columns=["prompt_hash"])["prompt_hash"].to_numpy()
    dataset = pinned.recipe.dataset(task)
    if not dataset.paths:
        return None
    files = list_files(dataset.paths)
    if sum(path.stat().st_size for path in files) > MAX_SCANNED_BYTES:
        return None
    hashes, num_rejected = [], 0
    for number, (_, raw) in enumerate(read_files(files, list(dataset.columns) if dataset.columns else None)):
        if number == pinned.recipe.limit:
            break
        try:
            hashes.append(accept(raw, dataset.format).prompt_hash)
        except Rejected:
            num_rejected += 1
    faulty = num_rejected > pinned.recipe.dataset_mixture.max_rejected_share * (len(hashes) + num_rejected)
    # An empty or faulty source is told of by its download, which knows what is wrong with it.
    return None if faulty or not hashes else np.array(hashes, dtype=np.uint64)
