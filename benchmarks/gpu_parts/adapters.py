"""g: LoRA by the real trainer: the loss falls, and the merged checkpoint is the adapter on its base."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import sft_core.train.models.model
from benchmarks.gpu_parts.jobs import Work
from benchmarks.gpu_parts.rows import Case, Context, Row, cases
from benchmarks.gpu_parts.shapes import config_of, documents, tokens
from benchmarks.gpu_parts.sides import apart, losses_of, our_trainer, weights_drawn_on
from sft_core.train.job import TrainJob
from sft_core.train.main import train
from sft_core.train.merge import merge
from sft_core.train.models.model import save_checkpoint

END = "<|turn_end|>"  # a token that the tokenizer does not have
FALLS = 0.1  # at least, of a loss of about 10
SAME, LEARNT = 1e-2, 5.0  # of the logits' norm; times the difference that the adapter has made


def run(context: Context) -> Iterator[Row]:
    if (reason := no_qlora(context)) is not None:
        yield context.row("QLoRA", note=f"left out: {reason}")
    yield from cases(context, listed(context))


def no_qlora(context: Context) -> str | None:
    """Why it cannot be had here, if so."""
    if not context.on_gpu:
        return "on a GPU only"
    return None if importlib.util.find_spec("bitsandbytes") else "bitsandbytes is not installed"


def listed(context: Context) -> list[Case]:
    tied, added = "LoRA, an added token on tied weights", {"add_special_tokens": [END], "eos_token": END}
    found = [
        Case(tied, 11, lambda: adapter_rows(context, tied, added), is_core=True),
        Case("LoRA", 8, lambda: adapter_rows(context, "LoRA", {}), is_core=True),
    ]
    if no_qlora(context) is None:
        found.append(Case("QLoRA", 10, lambda: qlora_rows(context), is_core=True))
    return found


def _work(context: Context, lora: dict[str, Any], model: dict[str, Any]) -> Work:
    """Documents of few different tokens: what can be learnt is that there are no others."""
    size = tokens(2048, context.device)
    return Work(
        config_of("135m", context.device),
        documents(size, size // 3),
        steps=20 if context.on_gpu else 8,
        packs_a_step=2,
        ids=16,
        training={"lora": {"r": 16, "lora_alpha": 32, **lora}, "learning_rate": 3e-3},
        runtime={"logging_steps": 1},
        model=model,
    )


def qlora_rows(context: Context) -> Iterator[Row]:
    base = context.folder / "base"
    model, tokenizer = _start(context, _work(context, {}, {}).job(base, base))
    save_checkpoint(model, tokenizer, None, base)
    del model
    of_base = {"model_name_or_path": str(base), "config": None}
    yield from adapter_rows(context, "QLoRA", of_base, {"load_in_4bit": True})


def _start(context: Context, job: TrainJob) -> tuple[Any, Any]:
    """The model that the job begins with, with attention that needs no bounds, and the tokenizer."""
    model = dataclasses.replace(job.spec.model, attn_implementation="sdpa")
    with weights_drawn_on(context.device):
        return sft_core.train.models.model.load_model(model, job.spec.tokenizer, seed=job.spec.training.seed)


def adapter_rows(
    context: Context, name: str, model: dict[str, Any], lora: dict[str, Any] | None = None
) -> Iterator[Row]:
    work = _work(context, lora or {}, model)
    job = work.write(context.folder / "".join(filter(str.isalnum, name)))
    with apart(work.config), weights_drawn_on(context.device), our_trainer():
        train(job)
        merge(job)
    losses = losses_of(job.out)
    yield context.row(
        f"{name}: the loss falls",
        losses[0] - losses[-1],
        "",
        f"{losses[0]:.3f} to {losses[-1]:.3f}",
        passed=losses[-1] < losses[0] - FALLS,
    )
    differs, learnt = merged_beside_adapted(context, job)
    yield context.row(
        f"{name}: merged == adapted",
        differs,
        "of norm",
        f"the adapter changes {learnt:.2g}",
        passed=differs <= SAME and learnt > LEARNT * differs,
    )


@torch.no_grad()
def merged_beside_adapted(context: Context, job: TrainJob) -> tuple[float, float]:
    """In fp32 on the CPU, as parts of the norm of the logits: merged from adapted, adapted from the base."""
    folder = job.out / "model"
    base = _start(context, job)[0].cpu().eval()
    ids = torch.arange(280, 292)[None]  # the added token's is 291
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, folder / "adapter", torch_device="cpu").eval()(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()(ids).logits
    return float((merged - adapted).norm() / adapted.norm()), float((adapted - before).norm() / before.norm())
