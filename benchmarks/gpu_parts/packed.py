"""b: documents in a pack are what they are by themselves, forward and backward; and what each attention takes.

The proof plants a leak: the pack as one document. Where that does not show, the proof itself has failed.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu_parts.jobs import trained_mask
from benchmarks.gpu_parts.meter import seconds_of
from benchmarks.gpu_parts.rows import Case, Context, Row, cases
from benchmarks.gpu_parts.shapes import documents, tokens
from sft_core.data.shards.token_shards import TokenRow
from sft_core.train.collate import Batch, collate, to_device
from sft_core.train.loss import Forward, trained_token_nll
from sft_core.train.models.attention import KNOWS_DOCUMENTS, VARLEN

CLEAR = 5.0  # times: by how much a leak differs more than rounding does
SHOWS = 0.05  # of the norm: a leak that changes less proves nothing
EXACT = 1e-4  # of the norm, in fp32 on a CPU
VOCABULARY = 1024


def attentions(context: Context) -> dict[str, str | None]:
    """Each by name, and why it cannot be had here if so."""
    no_flash = None if importlib.util.find_spec("flash_attn") else "flash-attn is not installed"
    return {
        VARLEN: None,
        "sdpa": None,
        "flash_attention_2": no_flash if context.on_gpu else "on a GPU only",
        "flex_attention": None if context.on_gpu else "no backward pass on a CPU",
    }


def run(context: Context) -> Iterator[Row]:
    for attention, reason in attentions(context).items():
        if reason is not None:
            yield context.row(f"{attention}: packed == separate", note=f"left out: {reason}")
    yield from cases(context, listed(context))


def listed(context: Context) -> list[Case]:
    """The proofs first, then the times; what is compiled first (flex attention), and a mask of 65 k x 65 k, last."""
    pack = tokens(8192, context.device)
    lengths = {301: [120, 1, 90, 90], pack: [pack * 5 // 8, pack // 4, pack - pack * 5 // 8 - pack // 4]}
    sizes = [tokens(size, context.device) for size in (8192, 32768, 65536)]
    proofs: list[Case] = []
    times: list[Case] = []
    for attention in (name for name, reason in attentions(context).items() if reason is None):
        compiles, has_mask = attention == "flex_attention", attention == "sdpa"
        for size, of in lengths.items():
            name = f"{attention}: packed == separate, {size:,} tokens"
            run = functools.partial(proof_rows, context, name, attention, of)
            proofs.append(Case(name, 20 if compiles else 3, run, is_core=not compiles))
        for size in sizes:
            name = f"{attention}: 4 layers forward + backward, {size:,} tokens"
            seconds = 12 if has_mask and size == sizes[-1] else 2
            timing = functools.partial(stack_rows, context, name, attention, size)
            times.append(Case(name, seconds, timing, is_core=not compiles and not has_mask))
    return sorted([*proofs, *times], key=lambda case: (not case.is_core, "flex" in case.name))


# Packed beside separate


def proof_rows(context: Context, name: str, attention: str, lengths: list[int]) -> Iterator[Row]:
    model = _model(attention, context.device, hidden=512 if context.on_gpu else 128, layers=3, large_weights=True)
    forward = Forward("bounds" if attention in KNOWS_DOCUMENTS else "positions")
    rng = np.random.default_rng(0)
    rows = [TokenRow(rng.integers(0, VOCABULARY, n).astype(np.int32), trained_mask(n)) for n in lengths]
    for row in rows:
        row.trained[0] = 0
    joined = TokenRow(*(np.concatenate([getattr(row, part) for row in rows]) for part in ("input_ids", "trained")))
    half = context.on_gpu  # as it trains there; a CPU takes fp32, which is exact

    def told(*batches: list[TokenRow]) -> tuple[torch.Tensor, torch.Tensor]:
        return nll_and_gradients(model, [_batch(batch, context.device) for batch in batches], forward, half=half)

    separate, packed, leaked = told(*([row] for row in rows)), told(rows), told([joined])
    for part, found, leak, expected in zip(("forward", "gradients"), packed, leaked, separate, strict=True):
        error, planted = (float((one - expected).norm() / expected.norm()) for one in (found, leak))
        bound = planted / CLEAR if half else EXACT
        yield context.row(
            f"{name}: {part}",
            error,
            "of norm",
            f"a planted leak {planted:.2g}{'' if planted > SHOWS else ', which does not show: the proof fails'}",
            passed=planted > SHOWS and error <= bound,
        )


def nll_and_gradients(
    model: Any, batches: list[Batch], forward: Forward, *, half: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all trained tokens, and of all weights in one: float32 on the CPU."""
    model.zero_grad()
    found = []
    for batch in batches:
        with torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=half):
            nll_N = trained_token_nll(model, batch, forward)
        nll_N.sum().backward()
        found.append(nll_N.detach().float().cpu())
    gradients = torch.cat([parameter.grad.float().cpu().ravel() for parameter in model.parameters()])
    return torch.cat(found), gradients


def _model(attention: str, device: str, *, hidden: int, layers: int, large_weights: bool = False) -> Any:
    """Heads of 128 on a GPU, of 32 on a CPU; four queries' heads share a key's, as in SmolLM3."""
    head = 128 if device == "cuda" else 32
    heads = hidden // head
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=head,
        max_position_embeddings=65536,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    if large_weights:  # so that attention shows in the loss
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.train()


def _batch(rows: list[TokenRow], device: str) -> Batch:
    return to_device(collate([(row, 0) for row in rows]), device)


# Time


def stack_rows(context: Context, name: str, attention: str, size: int) -> Iterator[Row]:
    model = _model(attention, context.device, hidden=2048 if context.on_gpu else 128, layers=4)
    lengths = documents(size, tokens(5000, context.device))
    ids = [np.zeros(length, np.int32) for length in lengths]
    # One trained token a document: the head costs nothing beside the layers.
    rows = [TokenRow(one, (np.arange(len(one)) == len(one) - 1).astype(np.uint8)) for one in ids]
    batch = _batch(rows, context.device)
    forward = Forward("bounds" if attention in KNOWS_DOCUMENTS else "positions")

    def step() -> None:
        with torch.autocast(context.device, torch.bfloat16):
            loss = trained_token_nll(model, batch, forward).sum()
        loss.backward()

    try:
        repeats = 3 if context.on_gpu and attention in KNOWS_DOCUMENTS else 1  # a mask makes it seconds each
        seconds = seconds_of(step, device=context.device, repeats=repeats, warm=1)
    except torch.OutOfMemoryError:
        yield context.row(name, note="out of memory")
        return
    pairs = sum(length**2 for length in lengths) / 2
    width = model.config.num_attention_heads * model.config.head_dim
    flops = 3.5 * 4 * pairs * width * 4  # of attention: four products forward and backward's five, in four layers
    note = f"{len(lengths)} documents; attention alone would be {flops / 1e12:.2f} TFLOP"
    yield context.row(name, 1e3 * seconds, "ms", note, key=f"stack.{attention}.{size}.ms")
