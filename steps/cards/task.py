"""A task on the card of evaluate: scores with their differences, and the rows that training won and lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sft_core.evaluate.comparison import by_change
from sft_core.evaluate.counts import EvaluatedCounts
from sft_core.evaluate.rows import read_rows
from sft_core.evaluate.summary import compare, read_answers
from sft_core.report.rows import Score
from sft_core.report.tables import score_rows
from sft_core.store.ref import Ref
from sft_core.store.store import Store
from steps.cards.pieces import facts, heading, table, warnings

MAX_EXAMPLES = 8  # rows shown for each of won, lost and the same


MAX_ASKED = 200  # characters of a prompt, from its end


def card(store: Store, refs: dict[str, Ref]) -> list[Any]:
    """The task's scores with their differences and red flags, and the rows that training won and lost.

    refs: the task's evaluation by each model, the start model first.
    """
    manifests = {model: store.manifest(ref) for model, ref in refs.items()}
    folders = {model: store.path(ref) for model, ref in refs.items()}
    (first, *_, last), arrow = refs, " → ".join(refs)
    task = manifests[last]["identity"]["part"]["task"]
    counts = {model: EvaluatedCounts.from_json(manifest["counts"]) for model, manifest in manifests.items()}
    released, scores = counts[last], {model: of_model.scores for model, of_model in counts.items()}
    compared = compare(folders[first], folders[last])
    answers = {model: read_answers(folder) for model, folder in folders.items()}
    rows = score_rows({task: scores}, {task: compared}, {task: answers})
    shown: dict[str, object] = {"rows": released.rows}
    if released.documents == "alone":
        shown["documents of a forward"] = "one: packed, they see each other in this model"
    for of_models in zip(*scores.values(), strict=True):
        metric = of_models[-1]["metric"]
        shown[f"{metric}: {arrow}"] = with_difference(of_models, compared.get(metric))
    if released.answers:
        shown["answers"] = released.answers
        if released.engine:
            shown["answered by"] = released.engine
        for name in ("generated_tokens", "cut_off", "empty", "timeouts"):
            amounts = (str(getattr(of_model, name)) for of_model in counts.values())
            shown[f"{name.replace('_', ' ')}: {arrow}"] = " → ".join(amounts)
    flags = [f"{row.metric}: {row.flags}" for row in rows if row.flags]
    components = [*facts(f"Task {task}", shown), *warnings(flags)]
    if not released.answers:
        return components
    won, lost, same = by_change(read_rows(folders[first]), read_rows(folders[last]))
    for name, meaning, pairs in (
        ("Won", f"{last} scores higher", won),
        ("Lost", f"{first} scores higher", lost),
        ("The same", "both score alike", same),
    ):
        components += _examples(name, meaning, pairs, (first, last))
    return components


def with_difference(scores: Sequence[Score], difference: Mapping[str, float | None] | None) -> str:
    """One metric's scores by each model, and how the last one differs from the first."""

    def value(score: Score) -> str:
        return f"{score['value']:.4f}" + ("" if score["stderr"] is None else f" ± {score['stderr']:.4f}")

    text = f"{' → '.join(map(value, scores))} (n {scores[-1]['n']})"
    if difference is None or difference["low"] is None:
        return text
    return f"{text}; {difference['value']:+.4f}, 95 % {difference['low']:+.4f} to {difference['high']:+.4f}"


def _examples(name: str, meaning: str, pairs: list[Any], models: tuple[str, str]) -> list[Any]:
    """The number of rows that changed in this way, and the answers to the first of them."""
    title = heading(f"{name}: {len(pairs)} rows, in which {meaning}")
    header = ("asked (its end)", "wanted", *(column for model in models for column in (f"{model} wrote", "score")))
    shown = [
        (_end(base["prompt"]), base["answer"], *_answer(base), *_answer(tuned)) for base, tuned in pairs[:MAX_EXAMPLES]
    ]
    return [title, *([table(header, shown)] if shown else [])]


def _answer(row: Mapping[str, Any]) -> tuple[str, str]:
    """row: one of ROWS (evaluate.rows)."""
    return row["outputs"][0], f"{row['score']:.4g}"


def _end(text: str) -> str:
    return text if len(text) <= MAX_ASKED else f"… {text[-MAX_ASKED:]}"
