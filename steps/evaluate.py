"""evaluate: base and tuned model on one task, on the same rows by the same code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.parquet as pq

from sft_core.data import splits
from sft_core.data.rejects import Rejected
from sft_core.data.sources import accept, list_files, read_files
from sft_core.evaluate import tasks
from sft_core.evaluate.comparison import by_change
from sft_core.evaluate.rows import read_rows
from sft_core.evaluate.summary import compare, read_answers
from sft_core.pins import PinnedRecipe
from sft_core.report.tables import score_rows
from sft_core.store.ref import Ref
from sft_core.store.stage import Needs, Part, Stage
from sft_core.store.store import Store
from steps import deliver
from steps.cards import facts, heading, table, warnings
from steps.download import CONVERSATIONS
from steps.scoring import asked_of_answers, wants_conversation
from steps.tokenize import TOKENS

MODELS = ("base", "tuned")
MAX_EXAMPLES = 8  # of the rows that were won, of those that were lost, and of the others
MAX_ASKED = 200  # characters of a prompt, from its end
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
        **asked_of_answers(pinned, part["task"]),
        "sampling": recipe.evaluation.sampling and recipe.evaluation.sampling.model_dump(mode="json"),
        **({} if recipe.evaluation.engine == "transformers" else {"engine": recipe.evaluation.engine}),
    }


def _needs(pinned: PinnedRecipe, part: Part) -> Needs:
    found: Needs = {"tokens": (TOKENS, {"source": part["task"]})}
    if wants_conversation(pinned, part["task"]):
        found["conversations"] = (CONVERSATIONS, {"source": part["task"]})
    return found if part["model"] == "base" else {**found, "trained": deliver.delivered(pinned)}


# The version stands for sft_core/evaluate: raise it when a change there changes a score.
EVALUATED = Stage(
    "evaluated",
    tasks.build_evaluated,
    section=_section,
    places=lambda pinned, part: {
        "model": pinned.model_loader if part["model"] == "base" else None,
        "tokenizer": pinned.tokenizer_loader,
    },
    needs=_needs,
    version=5,
    verify_inputs=True,
)


def measure_ahead(store: Store, pinned: PinnedRecipe, part: Part) -> None:
    """What has to be done for all tasks that vLLM answers before the first of them; see tasks.measure_ahead."""
    inputs = {
        name: store.path(store.ensure(stage, pinned, **needed))
        for name, (stage, needed) in _needs(pinned, part).items()
    }
    arguments = _section(pinned, part) | EVALUATED.places(pinned, part)
    tasks.measure_ahead(pinned.recipe.runtime, inputs, **arguments)


def card(store: Store, refs: dict[str, Ref]) -> list[Any]:
    """The task's scores with their differences and red flags, and the rows that were won and lost."""
    manifests = {model: store.manifest(refs[model]) for model in MODELS}
    folders = {model: store.path(refs[model]) for model in MODELS}
    task, tuned = manifests["tuned"]["identity"]["part"]["task"], manifests["tuned"]["counts"]
    scores = {model: manifests[model]["counts"]["scores"] for model in MODELS}
    compared = compare(folders["base"], folders["tuned"])
    counts = {model: read_answers(folders[model]) for model in MODELS}
    rows = score_rows({task: scores}, {task: compared}, {task: counts})
    shown: dict[str, Any] = {"rows": tuned["rows"]}
    for base, after in zip(scores["base"], scores["tuned"], strict=True):
        shown[f"{after['metric']}: base → tuned"] = told(base, after, compared.get(after["metric"]))
    if tuned["answers"]:
        shown["answers"] = tuned["answers"]
        if "engine" in tuned:
            shown["answered by"] = tuned["engine"]
        for name in ("generated_tokens", "cut_off", "empty", "timeouts"):
            before, after = (manifests[model]["counts"][name] for model in MODELS)
            shown[f"{name.replace('_', ' ')}: base → tuned"] = f"{before} → {after}"
    flags = [f"{row['metric']}: {row['flags']}" for row in rows if row["flags"]]
    components = [*facts(f"Task {task}", shown), *warnings(flags)]
    if not tuned["answers"]:
        return components
    won, lost, same = by_change(*(read_rows(folders[model]) for model in MODELS))
    for name, meaning, pairs in (
        ("Won", "the tuned model scores higher", won),
        ("Lost", "the base model scores higher", lost),
        ("The same", "both score alike", same),
    ):
        components += _examples(name, meaning, pairs)
    return components


def told(base: dict[str, Any], tuned: dict[str, Any], difference: dict[str, Any] | None) -> str:
    def value(score: dict[str, Any]) -> str:
        return f"{score['value']:.4f}" + ("" if score["stderr"] is None else f" ± {score['stderr']:.4f}")

    text = f"{value(base)} → {value(tuned)} (n {tuned['n']})"
    if difference is None or difference["low"] is None:
        return text
    return f"{text}; {difference['value']:+.4f}, 95 % {difference['low']:+.4f} to {difference['high']:+.4f}"


def _examples(name: str, meaning: str, pairs: list[Any]) -> list[Any]:
    """How many rows changed, and what was written in the first of them."""
    title = heading(f"{name}: {len(pairs)} rows, in which {meaning}")
    header = ("asked (its end)", "wanted", "base wrote", "score", "tuned wrote", "score")
    shown = [
        (_end(base["prompt"]), base["answer"], *(each for row in (base, tuned) for each in _written(row)))
        for base, tuned in pairs[:MAX_EXAMPLES]
    ]
    return [title, *([table(header, shown)] if shown else [])]


def _written(row: dict[str, Any]) -> tuple[str, str]:
    return row["outputs"][0], f"{row['score']:.4g}"


def _end(text: str) -> str:
    return text if len(text) <= MAX_ASKED else f"… {text[-MAX_ASKED:]}"


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
