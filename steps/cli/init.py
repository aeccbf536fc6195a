"""`sft init`: a recipe with comments, for a model and data."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from sft_core.data.sources.read import accept
from sft_core.data.sources.registry import source_of
from sft_core.data.sources.rejects import Rejected
from sft_core.recipe.datasets.dataset import Dataset
from sft_core.recipe.datasets.union import parse_dataset, section_claiming
from sft_core.recipe.parse import parse_recipe, read_yaml

ENOUGH_ROWS = 2000  # for a report share of 0.05
_RECIPE = """\
# A recipe of sft-flow. `sft plan {output}` says what a run will do;
# `python flows/sft_flow.py --config recipe {output} run` does it.
name: {name}

model:
  model_name_or_path: {model}
  # For a model without the template's control tokens:
  # add_special_tokens: ["<|im_start|>", "<|im_end|>"]
  # eos_token: "<|im_end|>"
  dtype: float32              # of the weights; training.bf16 computes in bfloat16 over them

chat_template:
  template: {template}          # thinking (think and no_think modes), a .jinja file, or null: the tokenizer's own

dataset_mixture:
  selection_share: 0.02       # prompts held out for decisions during training
  report_share: {report_share}          # prompts held out for the scores that are reported
  datasets:
{datasets}
packing:
  packing_strategy: ffd
  max_length: 2048
  over_long: drop             # or truncate, or error

training:
  loss_scope: assistant       # or completion (the last turn), or all tokens
  learning_rate: 2e-5
  lr_scheduler_type: cosine
  warmup_ratio: 0.03
  num_train_epochs: 1
  global_batch_size: 8        # packs an optimizer step, over all ranks
  bf16: true
  # lora: {{r: 16, lora_alpha: 32}}

evaluation:
  max_rows: 200               # report prompts scored for each task
  min_report_rows: {min_report_rows}         # fewer is an error: such scores mean little
  max_new_tokens: 256

runtime:
  num_processes: 1            # training ranks (GPUs) on this machine

# To push the checkpoint and its model card when all is done, with HF_TOKEN in the environment:
# hub: {{model_id: owner/name, private: true}}
"""


def write_recipe(model: str, data: tuple[str, ...], output: Path) -> None:
    """Writes a recipe that loads. Raises FileExistsError rather than replace a file."""
    if output.exists():
        raise FileExistsError(f"{output} exists; name another with --output")
    keys = {text: section_claiming(text).key for text in data}
    datasets = "".join(
        f"    - {keys[text]}: {json.dumps(text)}\n      weight: 1.0             # share of the rows; over 1 repeats\n"
        for text in data
    )
    report_share, min_report_rows = _held_out([parse_dataset({keys[text]: text}) for text in data])
    text = _RECIPE.format(
        report_share=report_share,
        min_report_rows=min_report_rows,
        output=output,
        name=json.dumps("".join(c if (c.isascii() and c.isalnum()) or c in "._-" else "-" for c in output.stem)),
        model=json.dumps(model),
        template="thinking",
        datasets=datasets,
    )
    parse_recipe(read_yaml(text))  # Parse before writing: a faulty file would block the next try.
    output.write_text(text, encoding="utf-8")


def _held_out(datasets: list[Dataset]) -> tuple[float, int]:
    """(report share, minimum of report rows): holds out about 80 prompts of the smallest source on this machine."""
    nums_prompts = []
    for dataset in datasets:
        if (rows := source_of(dataset).peek(None, None)) is not None:
            first_rows = itertools.islice(rows, ENOUGH_ROWS)
            nums_prompts.append(len({hash for _, raw in first_rows if (hash := _prompt_hash(raw)) is not None}))
    smallest = min(nums_prompts, default=ENOUGH_ROWS)
    share = min(0.3, max(0.05, round(80 / max(smallest, 1), 2)))
    return share, max(1, min(50, int(smallest * share * 0.6)))


def _prompt_hash(raw: Any) -> int | None:
    try:
        return accept(raw, "auto").prompt_hash
    except Rejected:
        return None  # the download counts rejected rows
