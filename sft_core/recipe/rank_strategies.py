"""The ways to share a model over training ranks: everything that differs between them, in one table.

A new way is an entry in STRATEGIES and its accelerate config, configs/accelerate/NAME.yaml. Others ask the entry, and
no other module compares names of strategies. Imports no torch: the recipe reads this table.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

Held = Literal["weights", "gradients", "optimizer"]
PLAIN = "a plain model"  # engaged_as of a model that nothing wraps


@dataclasses.dataclass(frozen=True)
class RankStrategy:
    """One way to share a model over ranks."""

    name: str  # of the accelerate config, and in runtime.distributed
    summary: str  # for messages
    shards: frozenset[Held]  # each rank holds a share of these, and all else whole
    # `DTensor` where accelerate returns a model of such parameters, else the class that wraps the model. Training
    # refuses any other model (train/strategy.py), for accelerate falls back to DDP without an error.
    engaged_as: str
    plain_on_one_rank: bool = False  # one rank trains a model that nothing wraps
    # Under training.bf16 weights and gradients are bf16, and the optimizer holds fp32 weights; there is no autocast.
    master_weights: bool = False
    gathers_bf16: bool = False  # under training.bf16 ranks send each other bf16 weights, which autocast need not copy
    fixed_ranks: bool = False  # a checkpoint holds the optimizer by rank: as many ranks have to read it
    needs_gpu: bool = False
    # Ranks that compute one model together (tensor or context parallelism) train on the same pack.
    ranks_a_pack: int = 1
    zero_stages: tuple[int, ...] = ()  # stages in others' recipes that mean this strategy, its own stage last
    accelerate_types: tuple[str, ...] = ()  # values of distributed_type in accelerate configs that mean it

    @property
    def shards_weights(self) -> bool:
        """Whether ranks have to gather weights, and so wait for each other, in each forward."""
        return "weights" in self.shards

    @property
    def holds_all(self) -> bool:
        """Whether a rank can compute and optimize by itself."""
        return not self.shards

    @property
    def computes_with_bf16_weights(self) -> bool:
        """Whether a forward under training.bf16 has bf16 weights, so that autocast copies none."""
        return self.master_weights or self.gathers_bf16

    def bytes_a_parameter(self, *, bf16: bool, dtype: str = "float32") -> tuple[int, int]:
        """(whole, shared): what each rank holds of weights, gradients and AdamW, and what all ranks share.

        fp32 weights and gradients take 4 + 4 bytes, AdamW's two moments 8. With master weights (ZeRO, arXiv 1910.02054,
        section 3) bf16 weights and gradients take 2 + 2, fp32 weights and moments 12. dtype: of the weights as they are
        loaded. bf16 weights without masters take 2 + 2 with their gradients, and moments of their dtype 4; but where
        ranks gather bf16 weights under training.bf16, accelerate trains fp32 copies of them (FSDP2).
        """
        upcast = self.gathers_bf16 and bf16
        in_bf16 = (bf16 and self.master_weights) or (dtype == "bfloat16" and not upcast)
        held: dict[Held, int] = {"weights": 2 if in_bf16 else 4, "gradients": 2 if in_bf16 else 4}
        held["optimizer"] = 12 if in_bf16 and self.master_weights else 4 if in_bf16 else 8
        shared = sum(size for name, size in held.items() if name in self.shards)
        return sum(held.values()) - shared, shared

    @property
    def checkpoint_bytes(self) -> int:
        """At most what a checkpoint takes, a parameter: fp32 weights and AdamW's moments, 12 bytes.

        With master weights the 16-bit weights are in it besides, twice where they are sharded.
        """
        return 16 if self.master_weights else 12

    def num_data_ranks(self, num_ranks: int) -> int:
        """How many ranks get packs of their own: the global batch is divided by this number."""
        return num_ranks // self.ranks_a_pack


STRATEGIES = {
    strategy.name: strategy
    for strategy in (
        RankStrategy(
            name="ddp",
            summary="every rank holds the model",
            shards=frozenset(),
            engaged_as="DistributedDataParallel",
            plain_on_one_rank=True,
            zero_stages=(0,),
            accelerate_types=("NO", "MULTI_GPU", "MULTI_CPU"),
        ),
        RankStrategy(
            name="fsdp2",
            summary="torch's fully_shard",
            shards=frozenset({"weights", "gradients", "optimizer"}),
            engaged_as="DTensor",
            gathers_bf16=True,
            needs_gpu=True,  # accelerate turns FSDP on for accelerators only
            accelerate_types=("FSDP",),
        ),
        RankStrategy(
            name="zero2",
            summary="ranks share gradients and optimizer",
            shards=frozenset({"gradients", "optimizer"}),
            engaged_as="DeepSpeedEngine, stage 2",
            master_weights=True,
            fixed_ranks=True,
            zero_stages=(1, 2),  # there is no ZeRO-1 here
        ),
        RankStrategy(
            name="zero3",
            summary="ranks share weights, gradients and optimizer",
            shards=frozenset({"weights", "gradients", "optimizer"}),
            engaged_as="DeepSpeedEngine, stage 3",
            master_weights=True,
            fixed_ranks=True,
            zero_stages=(3,),
        ),
    )
}
DEFAULT = "ddp"

if TYPE_CHECKING:
    StrategyName = str
else:
    StrategyName = Literal[tuple(STRATEGIES)]
