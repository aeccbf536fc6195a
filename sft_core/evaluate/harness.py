"""A task of EleutherAI's lm-evaluation-harness: its prompts, filters and metrics on a model of ours."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_core.evaluate.counts import HarnessCounts
from sft_core.evaluate.documents import SAMPLES
from sft_core.evaluate.loading import ModelToScore, scored_model, use_threads
from sft_core.evaluate.scores import Score
from sft_core.train.job import ModelLoader, TokenizerLoader

if TYPE_CHECKING:
    from pydantic import JsonValue

    from sft_core.data.rendering.templates import ChatTemplate
    from sft_core.evaluate.served_lm import ServedLM
    from sft_core.store.stage import Build, Json

log = logging.getLogger(__name__)
ROWS_AT_A_TIME = 32  # unless runtime.eval_batch_size says otherwise
_NO_METRIC = ("alias", "name", "sample_len", "sample_count")  # other columns of lm-eval's table
SHARES = ("acc", "exact_match")  # lm-eval's metrics whose score is a share of right answers


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
    """The chat template that renders prompts, the same for all models."""

    source: str | None
    kwargs: dict[str, JsonValue]
    date: str


@dataclasses.dataclass(frozen=True)
class HarnessTask:
    """A task of the harness, and where its YAMLs are: in `include_path`, and in `folders` of lm-eval."""

    name: str
    include_path: str | None
    folders: list[str]


@dataclasses.dataclass(frozen=True)
class HarnessRequest:
    """How a model is scored on a task of the harness: the stage's section, typed."""

    model: ModelLoader | None  # the start model's; None scores the trained model
    tokenizer: TokenizerLoader
    template: PromptTemplate | None  # None asks in plain text
    task: HarnessTask
    attn_implementation: str
    bf16: bool
    seed: int
    num_fewshot: int | None
    limit: int | None
    system_instruction: str | None
    gen_kwargs: dict[str, JsonValue]

    @classmethod
    def from_section(cls, section: Mapping[str, Any]) -> HarnessRequest:
        """section: JSON, with the stage's places in it. Raises TypeError for an unknown key."""
        model, template = section["model"], section["template"]
        typed = {
            "model": None if model is None else ModelLoader(**model),
            "tokenizer": TokenizerLoader(**section["tokenizer"]),
            "template": None if template is None else PromptTemplate(**template),
            "task": HarnessTask(**section["task"]),
        }
        return cls(**{**section, **typed})

    def model_to_score(self, trained: Path | None) -> ModelToScore:
        return ModelToScore(self.model, self.tokenizer, trained, self.attn_implementation, self.bf16, self.seed)


def build_harness(build: Build, **section: Any) -> dict[str, Json]:
    """Writes scores.json, and samples.jsonl with each document, its prompt, the model's responses and their scores.

    section: see HarnessRequest. Raises what the task raises.
    """
    import datasets

    from sft_core.pins.lm_eval_index import task_manager

    request = HarnessRequest.from_section(section)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # or the reader of local files is reported to a server
    use_threads(build.runtime)
    manager = task_manager(request.task.include_path, request.task.folders)

    from sft_core.evaluate.generate import as_served
    from sft_core.evaluate.served_lm import ServedLM

    with (
        scored_model(request.model_to_score(build.inputs.get("trained"))) as loaded,
        as_served(loaded.network),
    ):
        vocabulary = copy.deepcopy(loaded.facts.vocabulary)  # lm-eval changes its padding token and padding side
        lm = ServedLM(
            loaded.network,
            vocabulary,
            _rendering(request.template, vocabulary),
            build.runtime.eval_batch_size or ROWS_AT_A_TIME,
        )
        results = _evaluate(lm, manager, request)
    if lm.num_cut:
        log.warning(
            "cut=%d of %d prompts are longer than the context: their beginning is lost", lm.num_cut, lm.num_prompts
        )
    counts = HarnessCounts(
        rows=_num_documents(results),
        prompts=lm.num_prompts,
        cut=lm.num_cut,
        num_fewshot=_num_fewshot(results),
        scores=[score.to_json() for score in scores_of(results, request.task.name)],
    ).to_json()
    _write_samples(results, build.out / SAMPLES)
    (build.out / "scores.json").write_text(json.dumps(counts["scores"], indent=1) + "\n")
    return counts


def _rendering(template: PromptTemplate | None, vocabulary: Any) -> ChatTemplate | None:
    from sft_core.data.rendering.build import chat_template

    return None if template is None else chat_template(vocabulary, **vars(template))


def _evaluate(lm: ServedLM, manager: Any, request: HarnessRequest) -> Mapping[str, Any]:
    """lm-eval's results, which are JSON but for the values in samples."""
    from lm_eval import simple_evaluate

    has_template = request.template is not None
    results = simple_evaluate(
        lm,
        tasks=[request.task.name],
        task_manager=manager,
        num_fewshot=request.num_fewshot,
        limit=request.limit,
        apply_chat_template=has_template,
        fewshot_as_multiturn=has_template,
        system_instruction=request.system_instruction,
        gen_kwargs=request.gen_kwargs or None,
        batch_size=lm.batch_size,
        random_seed=request.seed,
        numpy_random_seed=request.seed,
        torch_random_seed=request.seed,
        fewshot_random_seed=request.seed,
    )
    assert results is not None, "lm-eval gives None on all ranks but the first, and this is the only one"
    return results


def scores_of(results: Mapping[str, Any], name: str) -> list[Score]:
    """The scores of a task or a group. Where it has none, as a tag, those of its members, with their names.

    A metric has lm-eval's name, followed by a comma and the filter where the task names a filter. Raises ValueError
    where there is no score.
    """
    table = results["results"]
    scores = _scores(table.get(name, {}), "", _num_documents(results))
    if not scores:
        for member, count in results["n-samples"].items():
            scores += _scores(table[member], f"{member} ", count["effective"])
    if not scores:
        raise ValueError(f"lm-eval's task {name} gave no score; see its metric_list and process_results")
    return scores


def _num_documents(results: Mapping[str, Any]) -> int:
    return sum(count["effective"] for count in results["n-samples"].values())


def _scores(row: Mapping[str, float | str], prefix: str, n: int) -> list[Score]:
    """The scores of a row of lm-eval's table. prefix: before the metrics' names."""
    scores = []
    for key, value in row.items():
        metric, _, filtered = key.partition(",")
        if key in _NO_METRIC or metric.endswith("_stderr") or isinstance(value, str):
            continue
        stderr = row.get(f"{metric}_stderr,{filtered}")
        # "N/A" or NaN where there is none.
        number = float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None
        name = metric if filtered in ("", "none") else key
        scores.append(Score(f"{prefix}{name}", float(value), number, n))
    return scores


def _num_fewshot(results: Mapping[str, Any]) -> int | str:
    """How many examples come before each question; "1 to 5" where members of a group differ."""
    shots = sorted({int(results["n-shot"].get(name, 0)) for name in results["n-samples"]})
    return shots[0] if len(shots) == 1 else f"{shots[0]} to {shots[-1]}"


def _write_samples(results: Mapping[str, Any], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for task, rows in results["samples"].items():
            for row in rows:
                file.write(json.dumps({"task": task, **row}, ensure_ascii=False, default=str) + "\n")
