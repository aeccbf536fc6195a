"""A task is a source's report split: loss on its trained tokens, and where the metric asks for them, scored answers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sft_core.data import splits
from sft_core.data.held_out import held_out_rows
from sft_core.data.shards import TokenRow, TokenShards, read_index
from sft_core.evaluate.answers import Engine, Output, asked_of, generate_outputs, served_prompt, stop_ids
from sft_core.evaluate.loading import load_scored
from sft_core.evaluate.metrics import strip_thinking
from sft_core.evaluate.rows import ROWS, answer_counts, scores
from sft_core.evaluate.scorers import Asked, Metric, load_metric
from sft_core.evaluate.with_vllm import gpu_by_itself, moved_to_vllm, unmet_vllm

if TYPE_CHECKING:
    from sft_core.store import Build

log = logging.getLogger(__name__)
TOKENS_A_FORWARD = 2048
TASKS_AT_A_TIME = 2  # as many share a machine's cores where the flow runs locally


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
    import torch

    torch.set_num_threads(build.runtime.num_threads or max(1, (os.cpu_count() or 1) // TASKS_AT_A_TIME))
    index = read_index(build.inputs["tokens"])
    shares = {"selection_share": selection_share, "report_share": report_share}
    rows, num_over_long = _rows(index, max_rows=max_rows, max_length=max_length, smoke=smoke, **shares)
    chosen = index.take(rows)
    shards = TokenShards(build.inputs["tokens"])
    token_rows = [shards[int(row)] for row in rows]
    with contextlib.ExitStack() as stack:
        if engine == "vllm":
            if unmet := unmet_vllm(build.runtime.vllm):
                raise ValueError(unmet)
            stack.enter_context(gpu_by_itself())
        network, vocabulary = load_scored(
            build.inputs.get("trained"), model, tokenizer, attn_implementation=attn_implementation, bf16=bf16, seed=seed
        )
        scorer, stops = stack.enter_context(load_metric(metric)), stop_ids(network)
        asked = asked_of(scorer, chosen, token_rows, network, vocabulary, build.inputs.get("conversations"))
        nll, num_correct = row_losses(network, token_rows)
        served = [served_prompt(row) for row in token_rows]
        prompts = {number: served[number] for number in asked}
        keys = {number: chosen["prompt_hash"][number].as_py() for number in asked}
        writer = stack.enter_context(_engine(engine, network, vocabulary, build, tokenizer["trust_remote_code"]))
        answers = generate_outputs(writer, vocabulary, stops, prompts, keys, sampling, max_new_tokens)
        found = {number: _scored(scorer, answers[number], asked[number], chosen, number) for number in asked}
        num_timeouts = scorer.num_timeouts
    shown = [asked[number].shown if number in asked else answer for number, answer in _numbered(chosen["answer"])]
    columns = {
        "row_id": chosen["row_id"],
        "prompt_hash": chosen["prompt_hash"],
        "nll": nll,
        "num_trained": [_num_targets(row) for row in token_rows],
        "num_correct": num_correct,
        "prompt": [vocabulary.decode(ids, skip_special_tokens=False) if len(ids) else None for ids in served],
        "answer": shown,
    }
    made = ROWS.names[len(columns) :]  # by answering
    columns |= {
        name: [found[number][name] if number in found else None for number in range(len(rows))] for name in made
    }
    table = pa.table(columns, schema=ROWS)
    pq.write_table(table, build.out / "rows.parquet", compression="zstd")
    scored = [dataclasses.asdict(score) for score in scores(table, scorer.name)]
    (build.out / "scores.json").write_text(json.dumps(scored, indent=1) + "\n")
    counts = {"rows": len(rows), "over_long": num_over_long, **answer_counts(table), "timeouts": num_timeouts}
    return {**counts, "engine": writer.name, "metric": scorer.name, "scores": scored}


@contextlib.contextmanager
def _engine(name: str, network: Any, tokenizer: Any, build: Build, trust_remote_code: bool) -> Iterator[Engine]:
    if name == "vllm":
        trained = build.inputs.get("trained")
        folder = None if trained is None else trained / "model"
        with moved_to_vllm(network, tokenizer, folder, build.runtime.vllm, trust_remote_code, build.out) as engine:
            yield engine
    else:
        from sft_core.evaluate.generate import WithTransformers

        yield WithTransformers(network, tokenizer.pad_token_id, build.runtime.eval_batch_size)


def _rows(index: pa.Table, *, max_rows: int, max_length: int, smoke: bool, **shares: float) -> tuple[np.ndarray, int]:
    """The numbers of the rows that are scored, and how many are too long."""
    found = held_out_rows(index, splits.REPORT, **shares)
    if smoke and len(found) == 0:
        log.warning("no report row among the first rows: this smoke run scores training rows")
        found = np.flatnonzero(index["num_trained"].to_numpy() > 0)
    fits = found[index["num_tokens"].to_numpy()[found] <= max_length]
    if len(fits) == 0:
        raise ValueError(
            f"the task has no report rows of at most {max_length} tokens; raise "
            "dataset_mixture.report_share or add data"
        )
    return fits[:max_rows], len(found) - len(fits)


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

    from sft_core.evaluate.loading import how_to_run
    from sft_core.train.collate import collate, to_device
    from sft_core.train.loss import trained_token_logits

    forward = how_to_run(model)
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
