"""i: tokens that sft_core/evaluate/generate.py writes in a second."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

import sft_core.train.models.model
from benchmarks.gpu_parts.jobs import TOKENIZER
from benchmarks.gpu_parts.rows import Case, Context, Row, cases
from benchmarks.gpu_parts.shapes import config_of
from benchmarks.gpu_parts.sides import apart, weights_drawn_on
from sft_core.evaluate.generate import generate_answers
from sft_core.train.job import ModelLoader, TokenizerLoader


def run(context: Context) -> Iterator[Row]:
    yield from cases(context, listed(context))


def listed(context: Context) -> list[Case]:
    loaded = "loaded as evaluation loads it"
    return [
        Case(f"135m, {loaded}", 5, lambda: rows(context, "135m", "auto"), is_core=True),
        Case(f"3b, {loaded}", 9, lambda: rows(context, "3b", "auto"), is_core=True),
        Case("135m, sdpa", 5, lambda: rows(context, "135m", "sdpa")),
        Case("3b, sdpa", 9, lambda: rows(context, "3b", "sdpa")),
    ]


def rows(context: Context, name: str, attention: str) -> Iterator[Row]:
    batch, length, new = (64, 256, 128) if context.on_gpu else (4, 32, 8)
    config = config_of(name, context.device)
    loader = ModelLoader(
        path=None,
        revision=None,
        config=config,
        dtype="float32",
        attn_implementation=attention,
        stop_tokens=[],
        trust_remote_code=False,
    )
    with apart(config):
        model = _load(context, loader)
        rng = np.random.default_rng(0)
        # Of unequal lengths, so that they are padded as real ones are.
        prompts = [
            rng.integers(0, config["vocab_size"], length - number % 8).astype(np.int32) for number in range(batch)
        ]
        never = config["vocab_size"]  # no token: none stops early
        options = {"stop_ids": [never], "pad_id": 0, "batch_size": batch}
        generate_answers(model, prompts, max_new_tokens=2, **options)
        begun = time.perf_counter()
        answers = generate_answers(model, prompts, max_new_tokens=new, **options)
        seconds, used = time.perf_counter() - begun, model.config._attn_implementation
        del model
    written = sum(map(len, answers))
    yield context.row(
        f"{name} {attention}: generated",
        written / seconds,
        "tokens/s",
        f"{batch} prompts of {length} tokens, {new} new ones each, bfloat16, {used}",
        passed=written == batch * new,
        key=f"generate.{name}.{attention}.tokens_per_s",
    )


def _load(context: Context, loader: ModelLoader) -> Any:
    """As sft_core/evaluate/loading.py does for a bf16 recipe; what `auto` means is asked before weights are drawn."""
    if loader.attn_implementation == "auto":
        config = sft_core.train.models.model.read_config(None, None, loader.config, False)
        chosen = sft_core.train.models.model.choose_attention("auto", config, half=True)
        loader = dataclasses.replace(loader, attn_implementation=chosen or "sdpa")
    tokenizer = TokenizerLoader(str(TOKENIZER), None, [], None, False)
    with weights_drawn_on(context.device):
        model, _ = sft_core.train.models.model.load_model(loader, tokenizer, seed=0, half=True)
    return model.to(device=context.device, dtype=torch.bfloat16).eval()
