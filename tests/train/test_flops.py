"""FLOPs by hand: of a dense model and of experts, of packs as the collator hands them out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sft_core.data.packing.plan import PackPlan
from sft_core.data.shards.token_shards import TokenShards
from sft_core.train.collate import PackCollator
from sft_core.train.flops import Flops, training_flops
from sft_core.train.job import TrainJob
from sft_core.train.models.model import skeleton
from tests.train.tiny import LLAMA, Run

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
ATTENTION = 2 * 32 * 32 + 2 * 32 * 16  # queries and output, keys and values
NORMS = 2 * 32  # of a layer


def flops_of(**config: Any) -> Flops:
    return training_flops(skeleton(path=None, revision=None, config=config, trust_remote_code=False))


@pytest.mark.parametrize("tied", [True, False])
def test_flops_of_a_dense_model_leave_out_the_lookup_and_have_the_head_apart(tied: bool) -> None:
    found = flops_of(**SIZES, model_type="llama", vocab_size=291, intermediate_size=80, tie_word_embeddings=tied)
    layer = ATTENTION + NORMS + 3 * 32 * 80
    assert found == Flops(token=6 * (3 * layer + 32), pair=6 * 3 * 32, trained_token=6 * 291 * 32)


def test_flops_of_learned_positions_are_a_lookup_too() -> None:
    found = flops_of(model_type="gpt2", vocab_size=291, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    weights, biases = 32 * 96 + 32 * 32 + 2 * 32 * 128, 96 + 32 + 128 + 32
    assert found.token == 6 * (2 * (weights + biases + 4 * 32) + 2 * 32)


@pytest.mark.parametrize(
    ("config", "num_experts", "top_k", "width", "others"),
    [
        (
            {"model_type": "qwen3_moe", "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2,
             "moe_intermediate_size": 24, "intermediate_size": 80},
            8, 2, 24, 2 * 8,
        ),
        ({"model_type": "mixtral", "num_local_experts": 4, "intermediate_size": 40}, 4, 2, 40, 0),
    ],
    ids=["qwen3_moe", "mixtral"],
)  # fmt: skip
def test_flops_of_experts_are_those_of_the_ones_a_token_uses(
    config: dict[str, Any], num_experts: int, top_k: int, width: int, others: int
) -> None:
    found = flops_of(**SIZES, vocab_size=291, tie_word_embeddings=False, **config)
    router, expert = 32 * num_experts, 3 * 32 * width
    layer = ATTENTION + NORMS + others + router + top_k * expert
    assert found == Flops(token=6 * (3 * layer + 32), pair=6 * 3 * 32, trained_token=6 * 291 * 32)


def test_flops_of_experts_in_a_list_are_those_of_the_ones_a_token_uses() -> None:
    # As the code that comes with a model has them.
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(4))
            self.router = nn.Linear(16, 4, bias=False)

    shape = skeleton(path=None, revision=None, config=LLAMA, trust_remote_code=False)
    before = training_flops(shape).token
    shape.config.num_experts_per_tok, shape.model.layers[0].mlp = 3, Layer()
    dense = 3 * LLAMA["hidden_size"] * LLAMA["intermediate_size"]
    assert training_flops(shape).token == before + 6 * (3 * 16 * 16 + 4 * 16 - dense)


def test_flops_are_the_sum_of_their_parts() -> None:
    flops = Flops(token=10.0, pair=0.5, trained_token=100.0)
    assert flops.of(7.0, 25.0, 3.0) == 70 + 12.5 + 300
    found = flops.of_documents(np.array([3, 4], np.int32), np.array([1, 2]))
    assert found.tolist() == [30 + 4.5 + 100, 40 + 8 + 200]


def test_trained_tokens_of_the_plan_are_those_of_its_batches(
    plain_run: Run, make_job: Callable[..., TrainJob], tmp_path: Path
) -> None:
    job = make_job(plain_run.pinned, tmp_path)
    collator = PackCollator.open(job.packs, job.tokens)
    plan = collator.plan
    cut = plan.num_tokens.copy()
    cut[::3] = np.maximum(1, cut[::3] - 5)  # as rows that are truncated
    shorter = PackCollator(
        PackPlan(plan.source, plan.row, cut, plan.offsets),
        [TokenShards(*folders) for folders in job.tokens],
    )
    for one in (collator, shorter):
        batches = [one.of_packs([[number]]) for number in range(len(plan.row))]
        expected = [int(batch["num_targets"].sum()) for batch in batches]
        assert one.num_trained.tolist() == expected
    assert 0 < shorter.num_trained.sum() < collator.num_trained.sum() < plan.num_tokens.sum()


def test_first_token_of_a_row_is_no_trained_one(tmp_path: Path) -> None:
    import pyarrow as pa

    from sft_core.data.shards.token_shards import TOKENS

    shard = tmp_path / "shard-00000"
    shard.mkdir()
    rows = [[1, 1, 1], [0, 1, 0, 1], [1]]
    columns = [pa.array(rows, TOKENS.types[0]), pa.array(rows, TOKENS.types[1]), pa.array([[]] * 3, TOKENS.types[2])]
    with pa.OSFile(str(shard / "tokens.arrow"), "wb") as file, pa.ipc.new_file(file, TOKENS) as writer:
        for first, last in ((0, 2), (2, 3)):
            writer.write_batch(pa.record_batch([column[first:last] for column in columns], schema=TOKENS))
    shards = TokenShards(tmp_path)
    assert len(shards) == 3
    found = shards.num_targets(np.array([2, 1, 0, 1], np.int32), np.array([1, 4, 3, 3], np.int32))
    assert found.tolist() == [0, 2, 2, 1]


def test_flops_of_a_model_without_a_head_have_none_of_it() -> None:
    from transformers import AutoConfig, AutoModel

    settings = dict(LLAMA)
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    assert training_flops(model).trained_token == 0 < training_flops(model).token
