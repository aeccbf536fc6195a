"""evaluate: base and tuned model on one task, on the same rows by the same code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from sft_core.data import splits
from sft_core.data.rejects import Rejected
from sft_core.data.sources.read import accept
from sft_core.data.sources.registry import source_of
from sft_core.evaluate import tasks
from sft_core.evaluate.comparison import by_change
from sft_core.evaluate.rows import read_rows
from sft_core.evaluate.summary import compare, read_answers
from sft_core.pins import PinnedRecipe
from sft_core.report.tables import score_rows
from sft_core.rounds import BASE
from sft_core.store.ref import Ref
from sft_core.store.stage import Needs, Part, Stage
from sft_core.store.store import Store
from steps.cards import facts, heading, table, warnings
from steps.download import CONVERSATIONS
from steps.scoring import asked_of_answers, wants_conversation
from steps.tokenize import TOKENS
from steps.train import checkpoint_of

MAX_EXAMPLES = 8  # of the rows that were won, of those that were lost, and of the others
MAX_ASKED = 200  # characters of a prompt, from its end
MAX_SCANNED_BYTES = 256 * 2**20  # larger sources are counted once they are downloaded


def _section(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    recipe, phase = pinned.recipe, pinned.phase(part)
    return {
        "model": pinned.model_identity if part["model"] == BASE else None,
        "tokenizer": pinned.tokenizer_identity,
        "attn_implementation": recipe.model.attn_implementation,
        **how_loaded(pinned),
        "selection_share": phase.dataset_mixture.selection_share,
        "report_share": phase.dataset_mixture.report_share,
        "max_rows": recipe.evaluation.max_rows,
        "max_length": phase.packing.max_length,
        "smoke": recipe.limit is not None,
        **asked_of_answers(pinned, part["task"]),
        "sampling": recipe.evaluation.sampling and recipe.evaluation.sampling.model_dump(mode="json"),
        **({} if recipe.evaluation.engine == "transformers" else {"engine": recipe.evaluation.engine}),
    }


def how_loaded(pinned: PinnedRecipe) -> dict[str, Any]:
    """The same for all models, so that their scores can be compared: in the precision of the last phase, and random
    weights by the first phase's seed, which drew them."""
    first = next(iter(pinned.recipe.phases.values()))
    return {"bf16": pinned.recipe.last_phase.training.bf16, "seed": first.training.seed}


def scored_model(pinned: PinnedRecipe, part: Part) -> Needs:
    """The checkpoint that an evaluation loads; none of the start model, which the recipe names."""
    return {} if part["model"] == BASE else {"trained": checkpoint_of(pinned, part["model"])}


def _needs(pinned: PinnedRecipe, part: Part) -> Needs:
    needs: Needs = {"tokens": (TOKENS, {"source": part["task"]})}
    if wants_conversation(pinned, part["task"]):
        needs["conversations"] = (CONVERSATIONS, {"source": part["task"]})
    return needs | scored_model(pinned, part)


# The version stands for sft_core/evaluate: raise it when a change there changes a score.
EVALUATED = Stage(
    "evaluated",
    tasks.build_evaluated,
    section=_section,
    places=lambda pinned, part: {
        "model": pinned.model_loader if part["model"] == BASE else None,
        "tokenizer": pinned.tokenizer_loader,
    },
    needs=_needs,
    version=5,
    verify_inputs=True,
)


def measure_ahead(store: Store, pinned: PinnedRecipe, part: Part) -> None:
    """See tasks.measure_ahead."""
    inputs = {
        name: store.path(store.ensure(stage, pinned, **needed))
        for name, (stage, needed) in _needs(pinned, part).items()
    }
    task = tasks.ScoredTask.from_section(_section(pinned, part) | EVALUATED.places(pinned, part))
    tasks.measure_ahead(pinned.recipe.runtime, inputs, task)


def card(store: Store, refs: dict[str, Ref]) -> list[Any]:
    """The task's scores with their differences and red flags, and the rows that were won and lost."""
    manifests = {model: store.manifest(ref) for model, ref in refs.items()}
    folders = {model: store.path(ref) for model, ref in refs.items()}
    (first, *_, last), arrow = refs, " → ".join(refs)
    task, released = manifests[last]["identity"]["part"]["task"], manifests[last]["counts"]
    scores = {model: manifest["counts"]["scores"] for model, manifest in manifests.items()}
    compared = compare(folders[first], folders[last])
    counts = {model: read_answers(folder) for model, folder in folders.items()}
    rows = score_rows({task: scores}, {task: compared}, {task: counts})
    shown: dict[str, Any] = {"rows": released["rows"]}
    for of_models in zip(*scores.values(), strict=True):
        metric = of_models[-1]["metric"]
        shown[f"{metric}: {arrow}"] = with_difference(of_models, compared.get(metric))
    if released["answers"]:
        shown["answers"] = released["answers"]
        if "engine" in released:
            shown["answered by"] = released["engine"]
        for name in ("generated_tokens", "cut_off", "empty", "timeouts"):
            amounts = (str(manifest["counts"][name]) for manifest in manifests.values())
            shown[f"{name.replace('_', ' ')}: {arrow}"] = " → ".join(amounts)
    flags = [f"{row['metric']}: {row['flags']}" for row in rows if row["flags"]]
    components = [*facts(f"Task {task}", shown), *warnings(flags)]
    if not released["answers"]:
        return components
    won, lost, same = by_change(read_rows(folders[first]), read_rows(folders[last]))
    for name, meaning, pairs in (
        ("Won", f"{last} scores higher", won),
        ("Lost", f"{first} scores higher", lost),
        ("The same", "both score alike", same),
    ):
        components += _examples(name, meaning, pairs, (first, last))
    return components


def with_difference(scores: Sequence[dict[str, Any]], difference: dict[str, Any] | None) -> str:
    """One metric's scores by each model, and how the last one differs from the first."""

    def value(score: dict[str, Any]) -> str:
        return f"{score['value']:.4f}" + ("" if score["stderr"] is None else f" ± {score['stderr']:.4f}")

    text = f"{' → '.join(map(value, scores))} (n {scores[-1]['n']})"
    if difference is None or difference["low"] is None:
        return text
    return f"{text}; {difference['value']:+.4f}, 95 % {difference['low']:+.4f} to {difference['high']:+.4f}"


def _examples(name: str, meaning: str, pairs: list[Any], models: tuple[str, str]) -> list[Any]:
    """How many rows changed, and what was written in the first of them."""
    title = heading(f"{name}: {len(pairs)} rows, in which {meaning}")
    header = ("asked (its end)", "wanted", *(column for model in models for column in (f"{model} wrote", "score")))
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
        counts_text = ", ".join(f"{task} has {count}" for task, count in few.items())
        raise ValueError(
            f"evaluation.min_report_rows: found too few unique report prompts ({counts_text}; at least {minimum} are "
            "needed); raise dataset_mixture.report_share, add data, leave the task out of evaluation.tasks, or "
            "lower evaluation.min_report_rows"
        )


def _count(store: Store, pinned: PinnedRecipe, task: str) -> int | None:
    mixture = pinned.phase({"task": task}).dataset_mixture
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
    dataset, mixture = pinned.recipe.dataset(task), pinned.phase({"task": task}).dataset_mixture
    rows = source_of(dataset).peek(MAX_SCANNED_BYTES, list(dataset.columns) if dataset.columns else None)
    if rows is None:
        return None
    hashes, num_rejected = [], 0
    for number, (_, raw) in enumerate(rows):
        if number == pinned.recipe.limit:
            break
        try:
            hashes.append(accept(raw, dataset.format).prompt_hash)
        except Rejected:
            num_rejected += 1
    faulty = num_rejected > mixture.max_rejected_share * (len(hashes) + num_rejected)
    # The download of an empty or faulty source fails, and says what is wrong with it.
    return None if faulty or not hashes else np.array(hashes, dtype=np.uint64)
