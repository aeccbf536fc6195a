"""The samples of a task of the lm-evaluation-harness, and the differences between two models on its documents."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from sft_core.evaluate.comparison import Difference, mean_difference

SAMPLES = "samples.jsonl"


def read_samples(folder: Path, at_most: int | None = None) -> list[dict[str, Any]]:
    """The samples of a scored task as lm-eval writes them, JSON; at_most: only the first."""
    with (folder / SAMPLES).open(encoding="utf-8") as file:
        return [json.loads(line) for line in itertools.islice(file, at_most)]


def document_differences(base: Path, tuned: Path) -> dict[str, Difference]:
    """tuned - base of each score that is a mean over documents, over the documents of both.

    Other scores, such as a perplexity, do not follow from the samples and are left out.
    """
    before, after = (_means(folder) for folder in (base, tuned))
    by_metric = {}
    for metric in before.keys() & after.keys():
        if shared := sorted(before[metric].keys() & after[metric].keys()):
            sides = (np.array([side[metric][document] for document in shared]) for side in (before, after))
            by_metric[metric] = mean_difference(*sides)
    return by_metric


def _means(folder: Path) -> dict[str, dict[tuple[str, ...], float]]:
    """{metric: {document: value}} of the scores that are the mean of these values."""
    values: dict[str, dict[tuple[str, ...], float]] = {}
    for sample in read_samples(folder):
        document = tuple(str(sample.get(name)) for name in ("task", "doc_id", "doc_hash", "prompt_hash"))
        for metric in sample["metrics"]:
            if isinstance(value := sample.get(metric), int | float):
                score = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                for name in (score, f"{sample['task']} {score}"):  # the latter where scores are of a group's members
                    values.setdefault(name, {})[document] = float(value)
    scores = {score["metric"]: score["value"] for score in json.loads((folder / "scores.json").read_text())}
    return {
        name: of_documents
        for name, of_documents in values.items()
        if name in scores and math.isclose(np.mean([*of_documents.values()]), scores[name], abs_tol=1e-9)
    }
