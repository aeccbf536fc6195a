"""A tiny recipe over a few quickstart rows, and what a training run of it left."""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

from sft_core.pins.pinned import PinnedRecipe
from sft_core.recipe.parse import parse_recipe
from sft_core.recipe.recipe import PhaseRecipe
from sft_core.rounds import ONLY

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "configs" / "quickstart"
SOURCES = ("copy_no_think", "checksum_think")
LLAMA = {
    "model_type": "llama",
    "vocab_size": 291,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "tie_word_embeddings": True,
}
# A model in which packed documents see each other.
OPT = {
    **{name: LLAMA[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
    "model_type": "opt",
    "ffn_dim": 64,
    "word_embed_proj_dim": 32,
    "dropout": 0.0,
    "init_std": 0.3,
    "max_position_embeddings": 512,
}
# 7 packs, 4 a step: the second step of each epoch has an empty slot. The gradient is clipped at most steps.
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "limit": 60,
    "model": {"tokenizer_name_or_path": str(QUICKSTART / "tokenizer"), "config": LLAMA},
    "chat_template": {"template": "thinking", "kwargs": {"header": False}},
    "dataset_mixture": {
        "selection_share": 0.05,
        "report_share": 0.3,
        "datasets": [{"path": str(QUICKSTART / f"{source}.jsonl")} for source in SOURCES],
    },
    "packing": {"max_length": 384},
    "training": {
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.0,
        "num_train_epochs": 3,
        "global_batch_size": 4,
        "weight_decay": 0.1,
        "extra": {"adam_beta2": 0.9},
    },
    "runtime": {"num_threads": 1, "save_steps": 100, "logging_steps": 1},
}


def tiny_recipe(**changes: dict[str, Any]) -> dict[str, Any]:
    """The tiny recipe with keys of its sections changed."""
    data = copy.deepcopy(RECIPE)
    for section, values in changes.items():
        data.setdefault(section, {}).update(values)
    return data


def phase_recipe(data: dict[str, Any]) -> PhaseRecipe:
    """What training reads of a recipe of one phase."""
    return parse_recipe(data).for_phase(ONLY)


class Run(NamedTuple):
    pinned: PinnedRecipe
    folder: Path  # model/ and logs/

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "logs" / "log.jsonl").read_text().splitlines()]


def processes_naming(text: str) -> list[int]:
    """Process ids whose command line holds the text, this process left out (Linux)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue  # it ended
        if text.encode() in command:
            found.append(int(entry.name))
    return found
