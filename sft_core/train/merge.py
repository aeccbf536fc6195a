"""Merges a trained LoRA adapter into its base: `python -m sft_core.train.merge JOB.json`.

It runs in a separate process after the ranks, and loads the whole base again in the recipe's dtype: a rank may hold
only a share of it, or 4-bit weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sft_core.die_with_parent import die_with_parent
from sft_core.train.job import TrainJob, read_job


def main(job_path: Path) -> None:
    die_with_parent()
    merge(read_job(TrainJob, job_path))


def merge(job: TrainJob) -> None:
    """Writes the merged model beside its adapter."""
    from peft import PeftModel

    from sft_core.train.models.model import load_model, save_checkpoint

    spec, folder = job.spec, job.out / "model"
    model, tokenizer = load_model(spec.model, spec.tokenizer, seed=spec.training.seed)
    merged = PeftModel.from_pretrained(model, str(folder / "adapter")).merge_and_unload()
    save_checkpoint(merged, tokenizer, spec.chat_template, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
