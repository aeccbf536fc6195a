"""A task is a source's report split: the loss of its trained tokens, and scored answers where the metric asks."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sft_core.data.packing.held_out import held_out_rows
from sft_core.data.shards.token_shards import TokenRow, TokenShards, read_index
from sft_core.data.sources import splits
from sft_core.evaluate.answers import Output, asked_of, generate_outputs, served_prompt
from sft_core.evaluate.counts import EvaluatedCounts
from sft_core.evaluate.engine import Engine, Request
from sft_core.evaluate.loading import (
    ModelToScore,
    ScoredModel,
    scored_model,
    use_threads,
)
from sft_core.evaluate.metrics.metric import Asked, Metric
from sft_core.evaluate.metrics.registry import load_metric
from sft_core.evaluate.rows import ROWS, answer_counts, scores
from sft_core.evaluate.scores import strip_thinking
from sft_core.evaluate.with_vllm import unmet_vllm
from sft_core.recipe.evaluation import Sampling
from sft_core.recipe.wording import some
from sft_core.train.job import ModelLoader, TokenizerLoader

if TYPE_CHECKING:
    from pydantic import JsonValue

    from sft_core.recipe.sections import Runtime
    from sft_core.store.stage import Build, Json

log = logging.getLogger(__name__)
TOKENS_A_FORWARD = 2048


@dataclasses.dataclass(frozen=True)
class ScoredTask:
    """How a model is scored on a task: the stage's section, typed."""

    model: ModelLoader | None  # the start model's; None scores the trained model
    tokenizer: TokenizerLoader
    attn_implementation: str
    bf16: bool
    seed: int
    selection_share: float
    report_share: float
    max_rows: int
    max_length: int  # tokens; longer rows are left out and counted, as in training
    smoke: bool  # a task without report rows is scored on the rows that it has
    metric: dict[str, JsonValue]  # registry.metric_identity
    max_new_tokens: int
    sampling: Sampling | None  # None: greedy answers
    engine: str = "transformers"  # of the answers; transformers measures losses in any case

    @classmethod
    def from_section(cls, section: Mapping[str, Any]) -> ScoredTask:
        """section: JSON, with the stage's places in it. Raises TypeError for an unknown key."""
        model, sampling = section["model"], section["sampling"]
        typed = {
            "model": None if model is None else ModelLoader(**model),
            "tokenizer": TokenizerLoader(**section["tokenizer"]),
            "sampling": None if sampling is None else Sampling(**sampling),
        }
        return cls(**{**section, **typed})

    def model_to_score(self, trained: Path | None) -> ModelToScore:
        return ModelToScore(self.model, self.tokenizer, trained, self.attn_implementation, self.bf16, self.seed)

    @property
    def room(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return self.max_length + self.max_new_tokens


@dataclasses.dataclass(frozen=True)
class ReportRows:
    """The rows of a task that are scored."""

    index: pa.Table
    tokens: list[TokenRow]
    key: tuple[str, bytes]  # equal for the same rows of the same tokens
    num_over_long: int

    @classmethod
    def read(cls, tokens: Path, task: ScoredTask) -> ReportRows:
        """Raises ValueError for a task without rows."""
        index, shards = read_index(tokens), TokenShards(tokens)
        shares = {"selection_share": task.selection_share, "report_share": task.report_share}
        held_out = held_out_rows(index, splits.REPORT, **shares)
        if task.smoke and len(held_out) == 0:
            log.warning("no report row among the first rows: this smoke run scores training rows")
            held_out = np.flatnonzero(index["num_trained"].to_numpy() > 0)
        short = held_out[index["num_tokens"].to_numpy()[held_out] <= task.max_length]
        if len(short) == 0:
            raise ValueError(
                f"the task has no report rows of at most {task.max_length} tokens; raise "
                "dataset_mixture.report_share or add data"
            )
        rows = short[: task.max_rows]
        key = str(tokens), rows.astype(np.int64).tobytes()
        return cls(index.take(rows), [shards[int(row)] for row in rows], key, len(held_out) - len(short))


class AnsweredRow(NamedTuple):
    """The columns of ROWS about a row's answers; lists have an entry for each sample."""

    outputs: list[str]
    num_generated: list[int]
    cut_off: list[bool]
    scores: list[float]
    score: float


def build_evaluated(build: Build, **section: Any) -> dict[str, Json]:
    """Writes scores.json, and rows.parquet with each row's loss, generated answers and their scores.

    section: see ScoredTask. Raises ValueError for a task without rows, for an answer that the metric cannot read, and
    for a missing vLLM.
    """
    task = ScoredTask.from_section(section)
    use_threads(build.runtime)
    if task.engine == "vllm" and (unmet := unmet_vllm(build.runtime.vllm)):
        raise ValueError(unmet)
    rows = ReportRows.read(build.inputs["tokens"], task)
    with scored_model(task.model_to_score(build.inputs.get("trained"))) as loaded, load_metric(task.metric) as metric:
        facts, conversations = loaded.facts, build.inputs.get("conversations")
        asked = asked_of(metric, rows.index, rows.tokens, facts.stops, facts.vocabulary, conversations)
        losses = measured_losses(loaded, rows)
        loaded.make_room(task.room)
        engine = _engine(task.engine, loaded, build)
        outputs = generate_outputs(engine, facts.vocabulary, _request(task, rows, asked, facts.stops))
        answered = {
            place: _scored(metric, outputs_of_row, asked[place], rows.index["row_id"][place].as_py())
            for place, outputs_of_row in zip(asked, outputs, strict=True)
        }
        num_timeouts = metric.num_timeouts
    table = _table(rows, losses, asked, answered, facts.vocabulary)
    pq.write_table(table, build.out / "rows.parquet", compression="zstd")
    task_scores = [score.to_json() for score in scores(table, metric.name)]
    (build.out / "scores.json").write_text(json.dumps(task_scores, indent=1) + "\n")
    return EvaluatedCounts(
        rows=len(rows.index),
        over_long=rows.num_over_long,
        **answer_counts(table),
        documents="alone" if loaded.documents_alone else None,
        timeouts=num_timeouts,
        engine=engine.name,
        metric=metric.name,
        scores=task_scores,
    ).to_json()


def measure_ahead(runtime: Runtime, inputs: Mapping[str, Path], task: ScoredTask) -> None:
    """Measures the losses of a task that vLLM will answer, and reserves the room that its answers need.

    Call it for all tasks of a kept model before the first is built: then the network is loaded once, and the engine is
    started once.
    """
    use_threads(runtime)
    rows = ReportRows.read(inputs["tokens"], task)
    with scored_model(task.model_to_score(inputs.get("trained"))) as loaded:
        measured_losses(loaded, rows)
        loaded.make_room(task.room)


def measured_losses(loaded: ScoredModel, rows: ReportRows) -> tuple[np.ndarray, np.ndarray]:
    """The result of row_losses. For rows that `measure_ahead` measured, the network is not loaded."""
    if rows.key not in loaded.losses:
        from sft_core.train.probe import forward_of

        losses = row_losses(loaded.network, rows.tokens)
        if not (are_finite := np.isfinite(losses[0])).all():
            ids = rows.index["row_id"].take(np.flatnonzero(~are_finite)).to_pylist()
            raise ValueError(
                f"the loss of {len(ids)} of {len(rows.index)} rows is not finite under {loaded.network.name_or_path}: "
                f"{some(ids)}; look at these rows, and at the model's weights and dtype"
            )
        loaded.losses[rows.key] = losses
        loaded.documents_alone = forward_of(loaded.network).alone  # which row_losses tried
    return loaded.losses[rows.key]


def _engine(name: str, loaded: ScoredModel, build: Build) -> Engine:
    if name == "vllm":
        return loaded.engine(build.runtime.vllm, build.out)
    from sft_core.evaluate.generate import WithTransformers

    return WithTransformers(loaded.network, loaded.facts.vocabulary.pad_token_id, build.runtime.eval_batch_size)


def _request(task: ScoredTask, rows: ReportRows, asked: Mapping[int, Asked], stops: list[int]) -> Request:
    """The prompts of the asked rows, in their order. A row's draws depend on the hash of its prompt."""
    return Request(
        [served_prompt(rows.tokens[place]) for place in asked],
        stops,
        task.max_new_tokens,
        task.sampling,
        [rows.index["prompt_hash"][place].as_py() for place in asked],
    )


def _scored(metric: Metric, outputs: list[Output], asked: Asked, row_id: str) -> AnsweredRow:
    try:
        values = [metric.score(strip_thinking(output.text), asked.wanted) for output in outputs]
    except Exception as error:
        error.add_note(f"while {metric.name} scored row {row_id}")
        raise
    return AnsweredRow(
        outputs=[output.text for output in outputs],
        num_generated=[output.num_tokens for output in outputs],
        cut_off=[output.cut_off for output in outputs],
        scores=values,
        score=sum(values) / len(values),
    )


def _table(
    rows: ReportRows,
    losses: tuple[np.ndarray, np.ndarray],
    asked: Mapping[int, Asked],
    answered: Mapping[int, AnsweredRow],
    tokenizer: Any,
) -> pa.Table:
    """The table of ROWS."""
    prompts = [served_prompt(row) for row in rows.tokens]
    answers = rows.index["answer"].to_pylist()
    columns = {
        "row_id": rows.index["row_id"],
        "prompt_hash": rows.index["prompt_hash"],
        "nll": losses[0],
        "num_trained": [_num_targets(row) for row in rows.tokens],
        "num_correct": losses[1],
        "prompt": [tokenizer.decode(ids, skip_special_tokens=False) if len(ids) else None for ids in prompts],
        "answer": [asked[place].shown if place in asked else answer for place, answer in enumerate(answers)],
    }
    for name in AnsweredRow._fields:
        columns[name] = [getattr(answered[place], name) if place in answered else None for place in range(len(answers))]
    return pa.table(columns, schema=ROWS)


def row_losses(model: Any, rows: list[TokenRow]) -> tuple[np.ndarray, np.ndarray]:
    """Each row's summed negative log-likelihood of its trained tokens, and how many of them are the likeliest.

    float64 and int64, shape (rows,). Rows share a forward where the model keeps them apart.
    """
    import torch
    import torch.nn.functional as F

    from sft_core.train.collate import collate, to_device
    from sft_core.train.loss import trained_token_logits
    from sft_core.train.probe import forward_of

    forward = forward_of(model)
    sums, num_correct = np.zeros(len(rows)), np.zeros(len(rows), np.int64)
    group: list[int] = []
    with torch.inference_mode():
        for number in range(len(rows)):
            group.append(number)
            room = TOKENS_A_FORWARD - sum(len(rows[member].input_ids) for member in group)
            if number + 1 == len(rows) or len(rows[number + 1].input_ids) > room:
                batch = to_device(collate([(rows[member], member) for member in group]), model.device)
                logits_NV = trained_token_logits(model, batch, forward)
                target_N, row_N = batch["target_ids"], batch["source"].cpu().numpy()
                nll_N = F.cross_entropy(logits_NV, target_N, reduction="none")
                np.add.at(sums, row_N, nll_N.double().cpu().numpy())
                np.add.at(num_correct, row_N, (logits_NV.argmax(dim=-1) == target_N).cpu().numpy())
                group = []
    return sums, num_correct


def _num_targets(row: TokenRow) -> int:
    return int(row.trained[1:].sum())  # the first token of a document is never a target
