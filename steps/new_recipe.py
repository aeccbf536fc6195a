"""`sft init`: a recipe with comments, for a model and data."""

from __future__ import annotations

import json
from pathlib import Path

from sft_core.pins import is_local
from sft_core.recipe import parse_recipe, read_yaml

_RECIPE = """\
# A recipe of sft-flow. `sft plan {output}` says what a run will do;
# `python flows/sft_flow.py --config recipe {output} run` does it.
name: {name}

model:
  model_name_or_path: {model}
  dtype: float32              # of the weights; training.bf16 computes in bfloat16 over them

chat_template:
  template: {template}          # thinking (think and no_think modes), a .jinja file, or null: the tokenizer's own

dataset_mixture:
  selection_share: 0.02       # prompts held out for decisions during training
  report_share: 0.05          # prompts held out for the scores that are reported
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
  min_report_rows: 50         # fewer is an error: such scores mean nothing
  max_new_tokens: 256

runtime:
  num_processes: 1            # training ranks (GPUs) on this machine
"""


def looks_like_files(source: str) -> bool:
    return "*" in source or source.count("/") != 1 or source.endswith((".jsonl", ".json", ".parquet", ".gz", ".zst"))


def write_recipe(model: str, data: tuple[str, ...], output: Path) -> None:
    """Writes a recipe that loads. Raises FileExistsError rather than replace one."""
    if output.exists():
        raise FileExistsError(f"{output} exists; name another with --output")
    datasets = ""
    for source in data:
        key = "path" if is_local(source) or looks_like_files(source) else "id"
        datasets += (
            f"    - {key}: {json.dumps(source)}\n      weight: 1.0             # share of the rows; over 1 repeats\n"
        )
    text = _RECIPE.format(
        output=output,
        name="".join(c if c.isalnum() or c in "._-" else "-" for c in output.name.removesuffix(".yaml")),
        model=json.dumps(model),
        template="thinking",
        datasets=datasets,
    )
    parse_recipe(read_yaml(text))  # Before it is written: a faulty file would stand in the way of the next try.
    output.write_text(text, encoding="utf-8")
