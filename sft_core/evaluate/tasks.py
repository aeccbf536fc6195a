"""A task is a source's report split: loss on its trained tokens and, where rows have an answer, exact match."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sft_core.data import splits
from sft_core.data.held_out import held_out_rows
from sft_core.data.shards import TokenRow, TokenShards, read_index
from sft_core.evaluate.metrics import exact_match
from sft_core.evaluate.rows import ROWS, scores

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
    smoke: bool,
) -> dict[str, Any]:
    """Writes scores.json, and rows.parquet with each row's loss, generated answer and whether that is right.

    model: how to load the start model; None scores the trained one. Rows over `max_length` are left out and
    counted, as in training. smoke: a task without report rows is scored on what it has. Raises ValueError for a
    task without rows.
    """
    import torch

    from sft_core.train.model import load_model

    torch.set_num_threads(build.runtime.num_threads or max(1, (os.cpu_count() or 1) // TASKS_AT_A_TIME))
    index = read_index(build.inputs["tokens"])
    found = held_out_rows(index, splits.REPORT, selection_share=selection_share, report_share=report_share)
    if smoke and len(found) == 0:
        log.warning("no report row among the first rows: this smoke run scores training rows")
        found = np.flatnonzero(index["num_trained"].to_numpy() > 0)
    fits = found[index["num_tokens"].to_numpy()[found] <= max_length]
    rows = fits[:max_rows]
    if len(rows) == 0:
        raise ValueError(
            f"the task has no report rows of at most {max_length} tokens; raise "
            "dataset_mixture.report_share or add data"
        )
    if model is None:
        folder = str(build.inputs["trained"] / "model")
        loader: dict[str, Any] = {"path": folder, "revision": None, "config": None}
        tokenizer = {**tokenizer, "path": folder, "revision": None, "add_special_tokens": []}
        model = {
            **loader,
            "dtype": "auto",
            "attn_implementation": attn_implementation,
            "stop_tokens": [],  # in the checkpoint's generation config
            "trust_remote_code": tokenizer["trust_remote_code"],
        }
    network: Any
    network, vocabulary = load_model(**model, tokenizer=tokenizer, seed=seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # In bfloat16 throughout, as it is served: autocast would convert every weight again for each new token.
    network.to(device=device, dtype=torch.bfloat16 if bf16 else None).eval()
    shards = TokenShards(build.inputs["tokens"])
    token_rows = [shards[int(row)] for row in rows]
    answers = [index["answer"][int(row)].as_py() for row in rows]
    nll = row_losses(network, token_rows)
    outputs = _generate(network, vocabulary, token_rows, answers, max_new_tokens, build.runtime.eval_batch_size)
    table = pa.table(
        {
            "row_id": index["row_id"].take(rows),
            "prompt_hash": index["prompt_hash"].take(rows),
            "nll": nll,
            "num_trained": [_num_targets(row) for row in token_rows],
            "answer": answers,
            "output": [output.text if output else None for output in outputs],
            "correct": [
                exact_match(output.text, str(answer)) if output else None
                for output, answer in zip(outputs, answers, strict=True)
            ],
            "cut_off": [output.cut_off if output else None for output in outputs],
        },
        schema=ROWS,
    )
    pq.write_table(table, build.out / "rows.parquet", compression="zstd")
    scored = [dataclasses.asdict(score) for score in scores(table)]
    (build.out / "scores.json").write_text(json.dumps(scored, indent=1) + "\n")
    return {"rows": len(rows), "over_long": len(found) - len(fits), "scores": scored}


@dataclasses.dataclass(frozen=True)
class Output:
    text: str
    cut_off: bool


def _generate(
    model: Any,
    tokenizer: Any,
    rows: list[TokenRow],
    answers: list[str | None],
    max_new_tokens: int,
    batch_size: int,
) -> list[Output | None]:
    """Greedy answers for the rows that have one to compare with, and a prompt."""
    from sft_core.evaluate.generate import generate_answers

    prompts = {number: served_prompt(rows[number]) for number, answer in enumerate(answers) if answer is not None}
    asked = [number for number, prompt in prompts.items() if len(prompt)]
    if num_unknown := len(prompts) - len(asked):
        log.warning(
            "not_asked=%d rows are trained from their first token: where the prompt ends is unknown", num_unknown
        )
    stop = model.generation_config.eos_token_id
    stop_ids = stop if isinstance(stop, list) else [stop]
    generated = generate_answers(
        model,
        [prompts[number] for number in asked],
        stop_ids=stop_ids,
        pad_id=tokenizer.pad_token_id,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    outputs: list[Output | None] = [None] * len(rows)
    for number, ids in zip(asked, generated, strict=True):
        cut_off = len(ids) == 0 or int(ids[-1]) not in stop_ids
        text = tokenizer.decode(ids if cut_off else ids[:-1], skip_special_tokens=False)
        outputs[number] = Output(text, cut_off)
    return outputs


def served_prompt(row: TokenRow) -> np.ndarray:
    """The ids before the last trained turn: what a server would be sent. int32, shape (tokens,).

    Empty when the whole row is trained: where its prompt ends is not known then.
    """
    starts = np.flatnonzero(np.diff(row.trained.astype(np.int8), prepend=0) == 1)
    assert len(starts), "a report row has trained tokens"
    return row.input_ids[: starts[-1]]


def row_losses(model: Any, rows: list[TokenRow]) -> np.ndarray:
    """Summed negative log-likelihood of each row's trained tokens: float64, shape (rows,)."""
    import torch

    from sft_core.train.collate import collate
    from sft_core.train.loss import trained_token_nll

    sums = np.zeros(len(rows))
    group: list[int] = []
    with torch.inference_mode():
        for number in range(len(rows)):
            group.append(number)
            room = TOKENS_A_FORWARD - sum(len(rows[member].input_ids) for member in group)
            if number + 1 == len(rows) or len(rows[number + 1].input_ids) > room:
                batch = {
                    name: values.to(model.device)
                    for name, values in collate([(rows[member], member) for member in group]).items()
                }
                nll_N, targets_N = trained_token_nll(model, batch)
                np.add.at(sums, batch["source"][0, targets_N].cpu().numpy(), nll_N.double().cpu().numpy())
                group = []
    return sums


def _num_targets(row: TokenRow) -> int:
    return int(row.trained[1:].sum())  # the first token of a document is never a target
