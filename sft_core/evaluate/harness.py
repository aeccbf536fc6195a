"""A task of EleutherAI's lm-evaluation-harness: its prompts, filters and metrics on a model of ours."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_core.evaluate.documents import SAMPLES
from sft_core.evaluate.loading import ModelToScore, scored_model, use_threads
from sft_core.evaluate.scores import Score
from sft_core.train.job import ModelLoader, TokenizerLoader

if TYPE_CHECKING:
    from sft_core.store.stage import Build

log = logging.getLogger(__name__)
ROWS_AT_A_TIME = 32  # unless runtime.eval_batch_size says otherwise
_NO_METRIC = ("alias", "name", "sample_len", "sample_count")
SHARES = ("acc", "exact_match")  # lm-eval's metrics whose score is a share of right answers


def build_harness(
    build: Build,
    *,
    model: dict[str, Any] | None,
    tokenizer: dict[str, Any],
    template: dict[str, Any] | None,
    task: dict[str, Any],
    attn_implementation: str,
    bf16: bool,
    seed: int,
    num_fewshot: int | None,
    limit: int | None,
    system_instruction: str | None,
    gen_kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Writes scores.json, and samples.jsonl with each document, its prompt, the model's responses and their scores.

    model: how to load the start model; None scores the trained model. template: the text, kwargs and date that prompts
    are rendered with, the same for both; None asks in plain text. task: its name and where its YAMLs are.
    Raises what the task raises.
    """
    import datasets

    from sft_core.data.rendering.build import chat_template
    from sft_core.pins.lm_eval_index import task_manager

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # or the reader of local files is reported to a server
    use_threads(build.runtime)
    manager = task_manager(task["include_path"], task["folders"])
    from lm_eval import simple_evaluate

    from sft_core.evaluate.generate import as_served
    from sft_core.evaluate.served_lm import ServedLM

    batch_size = build.runtime.eval_batch_size or ROWS_AT_A_TIME
    to_score = ModelToScore(
        None if model is None else ModelLoader(**model),
        TokenizerLoader(**tokenizer),
        build.inputs.get("trained"),
        attn_implementation,
        bf16,
        seed,
    )
    with scored_model(to_score) as loaded, as_served(loaded.network):
        vocabulary = copy.deepcopy(loaded.facts.vocabulary)  # lm-eval gives it a padding token and another side
        rendering = None if template is None else chat_template(vocabulary, **template)
        lm = ServedLM(loaded.network, vocabulary, rendering, batch_size)
        results = simple_evaluate(
            lm,
            tasks=[task["name"]],
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=template is not None,
            fewshot_as_multiturn=template is not None,
            system_instruction=system_instruction,
            gen_kwargs=gen_kwargs or None,
            batch_size=batch_size,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    assert results is not None, "one process evaluates, and it is the first"
    if lm.num_cut:
        log.warning(
            "cut=%d of %d prompts are longer than the context: their beginning is lost", lm.num_cut, lm.num_prompts
        )
    scores = [dataclasses.asdict(score) for score in scores_of(results, task["name"])]
    _write_samples(results["samples"], build.out / SAMPLES)
    (build.out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    rows = sum(count["effective"] for count in results["n-samples"].values())
    return {
        "rows": rows,
        "prompts": lm.num_prompts,
        "cut": lm.num_cut,
        "num_fewshot": _shots(results),
        "scores": scores,
    }


def scores_of(results: dict[str, Any], name: str) -> list[Score]:
    """The scores of a task; of a group, or else of its members (as for a tag, which has none), with their names.

    A metric has lm-eval's name, followed by a comma and the filter where the task names a filter. Raises ValueError
    where there is no score.
    """
    table = results["results"]
    scores = _scores(table.get(name, {}), "", sum(count["effective"] for count in results["n-samples"].values()))
    if not scores:
        for member, count in results["n-samples"].items():
            scores += _scores(table[member], f"{member} ", count["effective"])
    if not scores:
        raise ValueError(f"lm-eval's task {name} gave no score; see its metric_list and process_results")
    return scores


def _scores(row: dict[str, Any], prefix: str, n: int) -> list[Score]:
    scores = []
    for key, value in row.items():
        metric, _, filtered = key.partition(",")
        if key in _NO_METRIC or metric.endswith("_stderr") or isinstance(value, str):
            continue
        stderr = row.get(f"{metric}_stderr,{filtered}")
        number = None if stderr is None or isinstance(stderr, str) else float(stderr)  # "N/A" where there is none
        named = metric if filtered in ("", "none") else key
        scores.append(Score(f"{prefix}{named}", float(value), number, n))
    return scores


def _shots(results: dict[str, Any]) -> int | str:
    """How many examples came before each question; "1 to 5" where members of a group differ."""
    shots = sorted({int(results["n-shot"].get(name, 0)) for name in results["n-samples"]})
    return shots[0] if len(shots) == 1 else f"{shots[0]} to {shots[-1]}"


def _write_samples(samples: dict[str, list[dict[str, Any]]], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for task, rows in samples.items():
            for row in rows:
                file.write(json.dumps({"task": task, **row}, ensure_ascii=False, default=str) + "\n")
