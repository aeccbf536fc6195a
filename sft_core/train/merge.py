"""Merges what LoRA trained into its base: `python -m sft_core.train.merge JOB.json`.

A process of its own, after the ranks: the base is loaded anew, whole and in the recipe's dtype, whatever share of it or
however few bits of it a rank held.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sft_core.lifetime import die_with_parent


def main(job_path: Path) -> None:
    die_with_parent()
    merge(json.loads(job_path.read_text()))


def merge(job: dict[str, Any]) -> None:
    """Writes the merged model beside its adapter."""
    from peft import PeftModel

    from sft_core.train.model import load_model, save_checkpoint

    folder = Path(job["out"]) / "model"
    model, tokenizer = load_model(**job["model"], tokenizer=job["tokenizer"], seed=job["training"]["seed"])
    merged = PeftModel.from_pretrained(model, str(folder / "adapter")).merge_and_unload()
    save_checkpoint(merged, tokenizer, job["chat_template"], folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
