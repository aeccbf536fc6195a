"""Packs of random ids, token shards and the job of a rank over them, as the launcher writes it for real ones."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sft_core.data.packing.plan import write_plan
from sft_core.data.shards.token_shards import TOKENS
from sft_core.recipe.parse import parse_recipe
from sft_core.recipe.recipe import Recipe
from sft_core.rounds import ONLY
from sft_core.train.job import ModelLoader, TokenizerLoader, TrainJob, TrainSpec
from sft_core.train.memory.estimate import estimate
from sft_core.train.models.model import skeleton

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "configs" / "quickstart" / "tokenizer"
SOURCE = "random"
NUM_THREADS = max(1, min(8, (os.cpu_count() or 1) // 2))
NO_TRITON = "GPU_BENCHMARK_NO_TRITON"  # in the environment where part a found that kernels do not compile
TRAINED_SHARE = 0.7  # of a document: what follows its prompt


@dataclasses.dataclass(frozen=True)
class Work:
    """What is trained: packs of documents of these lengths (tokens), `packs_a_step` of them an optimizer step."""

    config: dict[str, Any]
    lengths: list[int]
    steps: int
    packs_a_step: int = 1
    packs_a_forward: int | None = 1  # None: as `auto` has it
    checkpointing: bool = False
    liger: bool | str = "auto"
    ids: int | None = None  # drawn from so many; None: from the whole vocabulary
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    runtime: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def pack(self) -> int:
        """Tokens of a pack."""
        return sum(self.lengths)

    @property
    def tokens_a_step(self) -> int:
        return self.pack * self.packs_a_step

    @property
    def use_liger(self) -> bool | str:
        return self.liger if triton_works() else False

    def documents(self) -> list[list[np.ndarray]]:
        """The ids of each document of each pack: of all steps, each pack once."""
        rng = np.random.default_rng(0)
        most = self.ids or self.config["vocab_size"]
        return [
            [rng.integers(0, most, length).astype(np.int32) for length in self.lengths]
            for _ in range(self.steps * self.packs_a_step)
        ]

    def recipe(self) -> Recipe:
        forward = "auto" if self.packs_a_forward is None else self.packs_a_forward * self.pack
        model = {"tokenizer_name_or_path": str(TOKENIZER), "config": self.config, "attn_implementation": "varlen"}
        training = {
            "max_steps": self.steps,
            "global_batch_size": self.packs_a_step,
            "bf16": True,
            "gradient_checkpointing": self.checkpointing,
            "use_liger_kernel": self.use_liger,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0.0,
            **self.training,
        }
        runtime = {"tokens_per_forward": forward, "save_steps": 10_000, "keep_checkpoints": 1, **self.runtime}
        return parse_recipe(
            {
                "name": "gpu",
                "model": {**model, **self.model},
                "chat_template": {"template": "thinking"},
                "dataset_mixture": {"datasets": [{"path": "none.jsonl", "name": SOURCE}]},
                "packing": {"max_length": self.pack},
                "training": training,
                "runtime": runtime,
            }
        )

    def estimated_gib(self) -> float:
        """Of the states and a forward of so many packs."""
        counted = estimate(self.recipe().for_phase(ONLY), self._shape(), None)
        assert counted.activations is not None, counted.why_unknown
        return (counted.states + counted.activations.total) / 2**30

    def num_parameters(self) -> int:
        return self._shape().num_parameters()

    def _shape(self) -> Any:
        return skeleton(path=None, revision=None, config=self.config, trust_remote_code=False)

    def write(self, folder: Path) -> TrainJob:
        """Writes packs and shards below the folder, and returns the job whose output is in folder/out."""
        folder.mkdir(parents=True, exist_ok=True)
        packs = self.documents()
        write_shard(folder / "tokens" / "shard-00000", [ids for pack in packs for ids in pack])
        in_pack = np.repeat(np.arange(len(packs)), len(self.lengths))
        lengths = np.tile(self.lengths, len(packs))
        write_plan(folder, in_pack, np.zeros_like(in_pack), np.arange(len(in_pack)), lengths)
        (folder / "out" / "logs").mkdir(parents=True)
        return self.job(folder, folder / "out")

    def job(self, folder: Path, out: Path) -> TrainJob:
        """The job of a training of the packs in `folder`. Writes nothing."""
        recipe = self.recipe()
        model = recipe.model
        spec = TrainSpec(
            rank_module="sft_core.train.main",
            model=ModelLoader(
                path=model.model_name_or_path,
                revision=None,
                config=model.config,
                dtype=model.dtype,
                attn_implementation=model.attn_implementation,
                stop_tokens=[],
                trust_remote_code=False,
            ),
            tokenizer=TokenizerLoader(
                path=str(TOKENIZER),
                revision=None,
                add_special_tokens=list(model.add_special_tokens),
                eos_token=model.eos_token,
                trust_remote_code=False,
            ),
            chat_template=None,
            training=recipe.last_phase.training,
            sources=[SOURCE],
        )
        return TrainJob(
            spec=spec,
            round=0,
            out=out,
            packs=folder,
            tokens=[[folder / "tokens"]],
            selection_packs=None,
            runtime=recipe.runtime,
            num_threads=NUM_THREADS,
        )


def triton_works() -> bool:
    """Whether Liger and the fused head are tried; without a C compiler they fail, and the rest is worth measuring."""
    return NO_TRITON not in os.environ


def trained_mask(length: int) -> np.ndarray:
    """uint8, shape (length,)."""
    return (np.arange(length) >= length * (1 - TRAINED_SHARE)).astype(np.uint8)


def write_shard(folder: Path, rows: list[np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    columns: list[list[Any]] = [rows, [trained_mask(len(ids)) for ids in rows], [[] for _ in rows]]
    with pa.OSFile(str(folder / "tokens.arrow"), "wb") as file, pa.ipc.new_file(file, TOKENS) as shard:
        arrays = [pa.array(values, field.type) for values, field in zip(columns, TOKENS, strict=True)]
        shard.write_batch(pa.record_batch(arrays, TOKENS))
