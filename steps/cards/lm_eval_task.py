"""A task of the lm-evaluation-harness on the card of evaluate."""

from __future__ import annotations

from typing import Any

from sft_core.evaluate.counts import HarnessCounts
from sft_core.evaluate.documents import read_samples
from sft_core.evaluate.summary import compare
from sft_core.recipe.evaluation import LM_EVAL
from sft_core.report.tables import score_rows
from sft_core.store.ref import Ref
from sft_core.store.store import Store
from steps.cards.pieces import facts, table, warnings
from steps.cards.task import with_difference

MAX_SHOWN = 12  # documents on a card


def card(store: Store, refs: dict[str, Ref]) -> list[Any]:
    """The task's scores, and some of its documents with the wanted answer and the responses.

    refs: the task's evaluation by each model, the start model first.
    """
    counts = {model: HarnessCounts.from_json(store.manifest(ref)["counts"]) for model, ref in refs.items()}
    first, *_, last = refs
    by_metric = [{score["metric"]: score for score in counts[model].scores} for model in refs]
    released = counts[last]
    shown: dict[str, object] = {"documents": released.rows, "examples before each": released.num_fewshot}
    if released.cut:
        shown["prompts cut to the model's context"] = f"{released.cut} of {released.prompts}"
    name = LM_EVAL + store.manifest(refs[last])["identity"]["part"]["task"]
    scores = {model: counts[model].scores for model in refs}
    compared = compare(store.path(refs[first]), store.path(refs[last]))
    flags = []
    for row in score_rows({name: scores}, {name: compared}, {}):
        of_models = [scores_of[row.metric] for scores_of in by_metric]
        shown[f"{row.metric}: {' → '.join(refs)}"] = with_difference(of_models, compared.get(row.metric))
        flags += [f"{row.metric}: {row.flags}"] if row.flags else []
    samples = [read_samples(store.path(refs[model]), MAX_SHOWN) for model in (first, last)]
    rows = [
        (
            str(after["arguments"][0][0])[-200:],
            after["target"],
            *(_responses(sample["filtered_resps"]) for sample in (before, after)),
        )
        for before, after in zip(*samples, strict=True)
    ]
    return [
        *facts(f"Task {name}", shown),
        *warnings(flags),
        table(("asked (its end)", "wanted", first, last), rows),
    ]


def _responses(responses: list[Any]) -> str:
    """The written answer; of a multiple-choice task the log-likelihood of each choice.

    lm-eval gives a choice as [log-likelihood, whether greedy decoding writes it].
    """
    return ", ".join(
        f"{response[0]:.1f}" if isinstance(response, list) and response else str(response) for response in responses
    )
