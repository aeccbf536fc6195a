"""The pipeline that the campaign disturbs: all stages of a small recipe, from rows to the released model.

    python -m tests.campaign.pipeline RECIPE.json

It builds what the store does not have, and ends. No scheduler: a start costs two seconds, so a campaign has many.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

from tests.flows.conftest import RECIPE

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "configs" / "quickstart"
NUM_STEPS, SAVE_STEPS = 40, 4


def recipe(store: str) -> dict[str, Any]:
    """Two sources with duplicates looked for, report prompts removed, rows split at turns, and the best step kept."""
    return {
        "name": "campaign",
        "model": {
            "tokenizer_name_or_path": str(QUICKSTART / "tokenizer"),
            "config": {**RECIPE["model"]["config"], "hidden_size": 64, "intermediate_size": 128},
        },
        "chat_template": {"template": "thinking", "kwargs": {"header": False}},
        "dataset_mixture": {
            "selection_share": 0.1,
            "report_share": 0.2,
            "deduplication": {"near": True},
            "decontamination": {"ngram": 8},
            "datasets": [
                {"name": name, "path": str(QUICKSTART / f"{name}.jsonl")}
                for name in ("checksum_think", "copy_no_think")
            ],
        },
        "packing": {"max_length": 128, "over_long": "split"},
        "training": {
            "learning_rate": 1e-3,
            "global_batch_size": 2,
            "max_steps": NUM_STEPS,
        },
        "evaluation": {
            "tasks": ["copy_no_think"],
            "max_rows": 8,
            "min_report_rows": 8,
            "max_new_tokens": 4,
            "during_training": {"every_epochs": 0.25, "max_rows": 20, "keep_best": True},
        },
        "runtime": {"store": store, "num_threads": 1, "save_steps": SAVE_STEPS, "logging_steps": 1},
        "limit": 200,
    }


def run(data: dict[str, Any]) -> str:
    """Builds everything, and returns the address of the release."""
    from sft_core.pins.pinned import pin
    from sft_core.recipe.parse import parse_recipe
    from sft_core.store.store import Store
    from steps.release import RELEASED

    pinned = pin(parse_recipe(data))
    return str(Store(pinned.recipe.runtime.store).ensure(RELEASED, pinned))


def files_of(store: Path) -> dict[str, str]:
    """{stage/key/file: SHA-256} of a store's data: no logs, which hold times, and no manifests, which hold dates.

    Nor the verdict on the training, which a flow's start tries, and which no other output reads.
    """
    found = {}
    for path in sorted(store.glob("[!.]*/*/**/*")):
        name = path.relative_to(store).as_posix()
        if name.startswith("verdict/"):
            continue
        if path.is_file() and path.name != "manifest.json" and name.split("/")[2] != "logs":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def steps_of(store: Path) -> list[int]:
    """The optimizer steps in the order in which they were computed, over all attempts."""
    logs = [*store.glob(".partial/trained-*/logs/train.log"), *store.glob("trained/*/logs/train.log")]
    text = logs[0].read_text(errors="replace") if logs else ""
    return [int(step) for step in re.findall(r"^step=(\d+)/", text, re.MULTILINE)]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(run(json.loads(Path(sys.argv[1]).read_text())))
