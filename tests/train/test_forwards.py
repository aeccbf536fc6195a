"""Several packs of a rank's step as one forward: the same objective, and bit for bit the same after a kill."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from sft_core.data.packing.plan import PackPlan
from sft_core.recipe.sections import Runtime, Training
from sft_core.train.assemble import log_balance
from sft_core.train.checkpoints import numbered, step_of
from sft_core.train.collate import Batch, collate
from sft_core.train.forwards import busiest_packs, in_forwards, packs_a_forward
from sft_core.train.loss import Forward, trained_token_nll
from sft_core.train.models.model import skeleton
from sft_core.train.objectives.sft import Sft
from sft_core.train.schedule import largest_divisor
from tests.train.test_loss import random_documents, tiny_model
from tests.train.tiny import Run, tiny_recipe

VARLEN = {"model": {"attn_implementation": "varlen"}}


def with_forwards(tokens: int | str, **changes: Any) -> dict[str, Any]:
    recipe = tiny_recipe(**VARLEN, **changes)
    recipe["runtime"] |= {"tokens_per_forward": tokens, "save_steps": 2}
    return recipe


def how_it_ran(run: Run) -> dict[str, Any]:
    return json.loads((run.folder / "logs" / "forward.jsonl").read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def one_pack(train_here: Callable[..., Run]) -> Run:
    return train_here(with_forwards("auto"))


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "packs"), [(2 * 384, 2), (3 * 384, 2), (4 * 384, 4), (10_000, 4), (100, 1)])
def test_objective_is_the_same_whatever_a_forward_holds(
    tokens: int, packs: int, one_pack: Run, train_here: Callable[..., Run]
) -> None:
    run = train_here(with_forwards(tokens))
    assert how_it_ran(one_pack)["packs_a_forward"] == 1 and how_it_ran(run)["packs_a_forward"] == packs
    for step, (found, expected) in enumerate(zip(run.events, one_pack.events, strict=True)):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6), f"{step=}"
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5), f"{step=}"
        assert {name for name in found if "loss/" in name} == {name for name in expected if "loss/" in name}


@pytest.mark.parametrize("kind", ["llama", "smollm3", "qwen2"])
def test_gradient_of_a_forward_is_the_sum_over_its_packs(kind: str) -> None:
    model = tiny_model(kind, "varlen")
    packs = [random_documents(*lengths) for lengths in ((40, 9, 1, 14), (64,), (5, 6, 50))]

    def gradients(*batches: Batch) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for batch in batches:
            nll_N = trained_token_nll(model, batch, Forward("bounds"))
            Sft().total(nll_N, batch).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        return {name: parameter.grad for name, parameter in model.named_parameters()}  # type: ignore[misc]

    expected, found = gradients(*map(collate, packs)), gradients(collate(*packs))
    assert len(found) > 20
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-6 * expected[name].norm(), name


@pytest.mark.slow
def test_resume_at_the_same_value_is_bit_equal_also_where_auto_would_choose_another(
    train_here: Callable[..., Run], tmp_path: Path
) -> None:
    whole = train_here(with_forwards(2 * 384))
    for tokens in (2 * 384, "auto"):
        out = tmp_path / str(tokens)
        out.mkdir()
        train_here(with_forwards(2 * 384), out)
        last = numbered(out / "checkpoints")[-1]
        assert step_of(last) == 6
        for path in (last, out / "model"):
            shutil.rmtree(path)
        resumed = train_here(with_forwards(tokens), out)
        assert how_it_ran(resumed)["packs_a_forward"] == 2
        one, other = (load_file(run.model / "model.safetensors") for run in (whole, resumed))
        assert all(one[name].equal(other[name]) for name in one)


def test_attention_with_a_mask_takes_one_pack(train_here: Callable[..., Run], caplog: pytest.LogCaptureFixture) -> None:
    recipe = tiny_recipe(training={"max_steps": 1}, runtime={"tokens_per_forward": 10_000})
    assert how_it_ran(train_here(recipe))["packs_a_forward"] == 1
    assert "tokens_per_forward=ignored attention=sdpa" in caplog.text


def plan_of(*packs: list[int]) -> PackPlan:
    lengths = np.array([length for pack in packs for length in pack], np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(pack) for pack in packs])])
    return PackPlan(np.zeros(len(lengths), np.int16), np.arange(len(lengths), dtype=np.int32), lengths, offsets)


def test_packs_of_a_forward_divide_those_of_a_step_by_the_longest_pack(caplog: pytest.LogCaptureFixture) -> None:
    plan, varlen = plan_of([60, 40], [90]), {"attention": "varlen", "together": True, "busiest": lambda longest: 5}
    found = [
        packs_a_forward(asked, written=None, plan=plan, packs_a_rank=12, **varlen) for asked in (99, 200, 599, 9999)
    ]
    assert found == [1, 2, 4, 12]
    assert packs_a_forward(400, written=None, plan=plan, packs_a_rank=12, **{**varlen, "together": False}) == 1
    assert packs_a_forward("auto", written=3, plan=plan, packs_a_rank=12, **varlen) == 3
    assert packs_a_forward("auto", written=3, plan=plan, packs_a_rank=4, **varlen) == 4, "on another number of ranks"
    assert packs_a_forward("auto", written=None, plan=plan, packs_a_rank=12, **varlen) == 4
    caplog.clear()
    assert packs_a_forward(200, written=4, plan=plan, packs_a_rank=12, **varlen) == 2
    assert "results differ by rounding" in caplog.text


SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
SMOLLM3 = SMOLLM2 | {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "vocab_size": 128256}
SMOLLM3 |= {"num_attention_heads": 16, "num_key_value_heads": 4}


@pytest.mark.slow
def test_auto_wants_as_many_packs_as_keep_a_gpu_busy_and_fit() -> None:
    def of(config: dict[str, Any], longest: int, gib: float, peak: float | None = 989e12) -> int:
        return busiest_packs(
            longest,
            training=Training(bf16=True, use_liger_kernel=False),
            runtime=Runtime(),
            shape=skeleton(path=None, revision=None, config=config, trust_remote_code=False),
            dtype="float32",
            attention="varlen",
            memory=gib * 2**30,
            peak=peak,
        )

    roomy, tight, slow = of(SMOLLM2, 4096, 1000), of(SMOLLM2, 4096, 24), of(SMOLLM2, 4096, 1000, peak=None)
    assert 8 <= roomy <= 16 and 1 < tight < roomy and 1 <= slow < roomy
    assert of(SMOLLM2, 4096, 1) == 1, "nothing fits, and a forward holds a pack all the same"
    assert of(SMOLLM3, 8192, 80) == 1, "a pack of 3 B keeps it busy"


@given(st.integers(1, 60), st.integers(-2, 70))
def test_largest_divisor_is_one(number: int, most: int) -> None:
    found = largest_divisor(number, most)
    assert number % found == 0 and (found <= most or found == 1)
    assert not any(number % other == 0 for other in range(found + 1, most + 1) if other <= number)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_in_forwards_each_rank_keeps_its_packs_in_their_order(steps: int, micro: int, packs: int, ranks: int) -> None:
    schedule = np.arange(steps * micro * packs * ranks).reshape(steps, -1)
    ordered = in_forwards(schedule, ranks, packs)
    # accelerate's BatchSamplerShard gives batch i, of `packs` slots, to rank i % ranks.
    batches = ordered.reshape(steps, micro, ranks, packs)
    for rank in range(ranks):
        mine = schedule.reshape(steps, micro * packs, ranks)[:, :, rank]
        assert batches[:, :, rank].reshape(steps, -1).tolist() == mine.tolist()


def test_balance_of_shared_weights_is_by_forwards(tmp_path: Path) -> None:
    costs, schedule = np.array([4.0, 1.0, 1.0, 4.0]), np.array([[0, 1, 2, 3]])  # rank 0: 4 and 1, rank 1: 1 and 4
    for packs, ratio in ((1, 8 / 5), (2, 1.0)):
        log_balance(tmp_path / "balance.jsonl", costs, schedule, 2, "zero3", packs)
        assert json.loads((tmp_path / "balance.jsonl").read_text())["slowest_over_mean"] == pytest.approx(
            ratio, abs=1e-6
        )
