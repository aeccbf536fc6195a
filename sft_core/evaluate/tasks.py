"""A task is a source's report split: loss on its trained tokens, and where the metric asks for them, scored answers."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sft_core.data import splits
from sft_core.data.held_out import held_out_rows
from sft_core.data.shards import TokenRow, TokenShards, read_index
from sft_core.evaluate.answers import Engine, Output, asked_of, generate_outputs, served_prompt
from sft_core.evaluate.loading import ScoredModel, scored_model, use_threads
from sft_core.evaluate.metrics import strip_thinking
from sft_core.evaluate.rows import ROWS, answer_counts, scores
from sft_core.evaluate.scorers import Asked, Metric, load_metric
from sft_core.evaluate.with_vllm import unmet_vllm

if TYPE_CHECKING:
    from sft_core.sections import Runtime
    from sft_core.store import Build

log = logging.getLogger(__name__)
TOKENS_A_FORWARD = 2048


@dataclasses.dataclass(frozen=True)
class ReportRows:
    """The rows of a task that are scored."""

    chosen: pa.Table  # of the index
    tokens: list[TokenRow]
    key: tuple[str, bytes]  # which rows of which tokens these are
    num_over_long: int

    @classmethod
    def read(
        cls,
        tokens: Path,
        *,
        selection_share: float,
        report_share: float,
        max_rows: int,
        max_length: int,
        smoke: bool,
    ) -> ReportRows:
        """Raises ValueError for a task without rows."""
        index, shards = read_index(tokens), TokenShards(tokens)
        found = held_out_rows(index, splits.REPORT, selection_share=selection_share, report_share=report_share)
        if smoke and len(found) == 0:
            log.warning("no report row among the first rows: this smoke run scores training rows")
            found = np.flatnonzero(index["num_trained"].to_numpy() > 0)
        fits = found[index["num_tokens"].to_numpy()[found] <= max_length]
        if len(fits) == 0:
            raise ValueError(
                f"the task has no report rows of at most {max_length} tokens; raise "
                "dataset_mixture.report_share or add data"
            )
        rows = fits[:max_rows]
        key = str(tokens), rows.astype(np.int64).tobytes()
        return cls(index.take(rows), [shards[int(row)] for row in rows], key, len(found) - len(fits))


def build_evaluated(
    build: Build,
    *,
    model: dict[str, Any] | None,
    tokenizer: dict[str, Any],
    attn_implementation: str,
    bf16: bool,
    seed: int,
    selection_share: float,
    report_share: float,
    max_rows: int,
    max_length: int,
    max_new_tokens: int,
    metric: dict[str, Any],
    sampling: dict[str, Any] | None,
    smoke: bool,
    engine: str = "transformers",
) -> dict[str, Any]:
    """Writes scores.json, and rows.parquet with each row's loss, generated answers and their scores.

    model: how to load the start model; None scores the trained one. Rows over `max_length` are left out and
    counted, as in training. metric: its identity (scorers.metric_identity). sampling: None for greedy answers. smoke:
    a task without report rows is scored on what it has. engine: what answers; losses are always transformers'. Raises
    ValueError for a task without rows, for an answer that the metric cannot read, and where vLLM is missing.
    """
    use_threads(build.runtime)
    if engine == "vllm" and (unmet := unmet_vllm(build.runtime.vllm)):
        raise ValueError(unmet)
    shares = {"selection_share": selection_share, "report_share": report_share}
    rows = ReportRows.read(build.inputs["tokens"], max_rows=max_rows, max_length=max_length, smoke=smoke, **shares)
    loading = {"attn_implementation": attn_implementation, "bf16": bf16, "seed": seed}
    with (
        scored_model(build.inputs.get("trained"), model, tokenizer, **loading) as loaded,
        load_metric(metric) as scorer,
    ):
        facts, chosen = loaded.facts, rows.chosen
        asked = asked_of(scorer, chosen, rows.tokens, facts.stops, facts.vocabulary, build.inputs.get("conversations"))
        nll, num_correct = measured_losses(loaded, rows)
        loaded.make_room(max_length + max_new_tokens)
        served = [served_prompt(row) for row in rows.tokens]
        prompts = {number: served[number] for number in asked}
        keys = {number: chosen["prompt_hash"][number].as_py() for number in asked}
        writer = _engine(engine, loaded, build)
        answers = generate_outputs(writer, facts.vocabulary, facts.stops, prompts, keys, sampling, max_new_tokens)
        found = {number: _scored(scorer, answers[number], asked[number], chosen, number) for number in asked}
        num_timeouts = scorer.num_timeouts
    shown = [asked[number].shown if number in asked else answer for number, answer in _numbered(chosen["answer"])]
    decode = functools.partial(facts.vocabulary.decode, skip_special_tokens=False)
    columns = {
        "row_id": chosen["row_id"],
        "prompt_hash": chosen["prompt_hash"],
        "nll": nll,
        "num_trained": [_num_targets(row) for row in rows.tokens],
        "num_correct": num_correct,
        "prompt": [decode(ids) if len(ids) else None for ids in served],
        "answer": shown,
    }
    made = ROWS.names[len(columns) :]  # by answering
    columns |= {
        name: [found[number][name] if number in found else None for number in range(len(chosen))] for name in made
    }
    table = pa.table(columns, schema=ROWS)
    pq.write_table(table, build.out / "rows.parquet", compression="zstd")
    scored = [dataclasses.asdict(score) for score in scores(table, scorer.name)]
    (build.out / "scores.json").write_text(json.dumps(scored, indent=1) + "\n")
    counts = {"rows": len(chosen), "over_long": rows.num_over_long, **answer_counts(table), "timeouts": num_timeouts}
    return {**counts, "engine": writer.name, "metric": scorer.name, "scores": scored}


def measure_ahead(
    runtime: Runtime,
    inputs: Mapping[str, Path],
    *,
    model: dict[str, Any] | None,
    tokenizer: dict[str, Any],
    attn_implementation: str,
    bf16: bool,
    seed: int,
    selection_share: float,
    report_share: float,
    max_rows: int,
    max_length: int,
    max_new_tokens: int,
    smoke: bool,
    **others: Any,
) -> None:
    """Of a task that vLLM will answer what the network is needed for, and the room that its answers want.

    With the arguments of build_evaluated. Where this is done for all of a kept model's tasks before the first is
    built, its network is loaded once and its engine started once.
    """
    use_threads(runtime)
    shares = {"selection_share": selection_share, "report_share": report_share}
    rows = ReportRows.read(inputs["tokens"], max_rows=max_rows, max_length=max_length, smoke=smoke, **shares)
    loading = {"attn_implementation": attn_implementation, "bf16": bf16, "seed": seed}
    with scored_model(inputs.get("trained"), model, tokenizer, **loading) as loaded:
        measured_losses(loaded, rows)
        loaded.make_room(max_length + max_new_tokens)


def measured_losses(loaded: ScoredModel, rows: ReportRows) -> tuple[np.ndarray, np.ndarray]:
    """As row_losses, of rows that were measured ahead without a look at the network."""
    if rows.key not in loaded.losses:
        loaded.losses[rows.key] = row_losses(loaded.network, rows.tokens)
    return loaded.losses[rows.key]


def _engine(name: str, loaded: ScoredModel, build: Build) -> Engine:
    if name == "vllm":
        return loaded.engine(build.runtime.vllm, build.out)
    from sft_core.evaluate.generate import WithTransformers

    return WithTransformers(loaded.network, loaded.facts.vocabulary.pad_token_id, build.runtime.eval_batch_size)


def _numbered(column: pa.ChunkedArray) -> list[tuple[int, Any]]:
    return list(enumerate(column.to_pylist()))


def _scored(scorer: Metric, outputs: list[Output], asked: Asked, chosen: pa.Table, number: int) -> dict[str, Any]:
    """A row's columns of ROWS that its outputs lead to."""
    try:
        values = [scorer.score(strip_thinking(output.text), asked.wanted) for output in outputs]
    except Exception as error:
        error.add_note(f"while {scorer.name} scored row {chosen['row_id'][number].as_py()}")
        raise
    return {
        "outputs": [output.text for output in outputs],
        "num_generated": [output.num_tokens for output in outputs],
        "cut_off": [output.cut_off for output in outputs],
        "scores": values,
        "score": sum(values) / len(values),
    }


def row_losses(model: Any, rows: list[TokenRow]) -> tuple[np.ndarray, np.ndarray]:
    """Of each row's trained tokens, the summed negative log-likelihood and how many are the likeliest.

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
                wanted_N, row_N = batch["target_ids"], batch["source"].cpu().numpy()
                nll_N = F.cross_entropy(logits_NV, wanted_N, reduction="none")
                np.add.at(sums, row_N, nll_N.double().cpu().numpy())
                np.add.at(num_correct, row_N, (logits_NV.argmax(dim=-1) == wanted_N).cpu().numpy())
                group = []
    return sums, num_correct


def _num_targets(row: TokenRow) -> int:
    return int(row.trained[1:].sum())  # the first token of a document is never a target
