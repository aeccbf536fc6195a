"""The trainer against the formula: L = sum of nll over the trained tokens of the global batch / their number."""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from sft_core.data.packing.balance import pack_costs
from sft_core.data.packing.plan import PackPlan
from sft_core.data.shards.token_shards import TokenShards
from sft_core.pins.pinned import PinnedRecipe
from sft_core.train.job import TrainJob
from sft_core.train.models.model import load_model
from sft_core.train.schedule import EMPTY, order_coefficients, step_packs
from tests.train.tiny import LLAMA, Run, tiny_recipe


def costs_of(plan: PackPlan, model: Any) -> np.ndarray:
    linear, quadratic = order_coefficients(model)
    return pack_costs(plan.num_tokens, plan.offsets, linear=linear, quadratic=quadratic)


def documents_of(
    plan: PackPlan, shards: list[TokenShards], packs: np.ndarray
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids, and a mask of those from the second on that are trained, of each document of the packs."""
    for pack in packs[packs != EMPTY]:
        for entry in range(plan.offsets[pack], plan.offsets[pack + 1]):
            row = shards[plan.source[entry]][int(plan.row[entry])]
            yield torch.tensor(row.input_ids.astype("int64")), torch.tensor(row.trained[1:] == 1)


@pytest.fixture(scope="module")
def reference(
    plain_run: Run, make_job: Callable[[PinnedRecipe, Path], TrainJob]
) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """Loss and gradient norm of each step, and the last weights, of AdamW over documents one at a time."""
    job = make_job(plain_run.pinned, plain_run.folder)
    training = job.spec.training
    plan, shards = PackPlan.read(job.packs), [TokenShards(*folders) for folders in job.tokens]
    model, _ = load_model(job.spec.model, job.spec.tokenizer, seed=training.seed)
    schedule = step_packs(costs_of(plan, model), global_batch_size=4, num_epochs=3, max_steps=None, seed=training.seed)
    assert len(schedule) == 6
    assert (schedule == EMPTY).sum() == 3, "an epoch's last batch is smaller than the others"

    documents = functools.partial(documents_of, plan, shards)
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.9), eps=1e-8)
    curve = []
    for step, packs in enumerate(schedule):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / len(schedule))
        num_trained = sum(int(mask.sum()) for _, mask in documents(packs))
        loss = 0.0
        for ids, mask in documents(packs):
            nll = F.cross_entropy(model(ids[None], use_cache=False).logits[0, :-1], ids[1:], reduction="none")
            part = nll[mask].sum() / num_trained
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss, norm))
    return curve, model.state_dict()


def curve_of(run: Run) -> list[tuple[float, float]]:
    return [(event["loss"], event["grad_norm"]) for event in run.events]


def test_curve_one_process_equals_the_reference(plain_run: Run, reference: Any) -> None:
    curve, weights = reference
    found = curve_of(plain_run)
    assert len(found) == 6
    assert found[0][0] == pytest.approx(curve[0][0], rel=1e-6)
    for step, (of_run, of_reference) in enumerate(zip(found, curve, strict=True)):
        assert of_run == pytest.approx(of_reference, rel=1e-5), f"{step=}"
    assert found[-1][0] < found[0][0] - 0.5, "so little was learned that a wrong step could hide"
    assert max(norm for _, norm in found) > 1, "the gradient was never clipped"
    saved = load_file(plain_run.model / "model.safetensors")
    assert len(saved) > 10
    for name, values in saved.items():
        torch.testing.assert_close(values, weights[name], atol=2e-5, rtol=1e-4)


def test_log_tells_speed_and_memory(plain_run: Run) -> None:
    for event in plain_run.events:
        assert event["tflops_per_s"] > 0
        assert 0.1 < event["memory_gib"] < 16
        assert "mfu" not in event, "nobody knows the peak of a CPU"
        assert {"grad_norm", "tokens_per_s", "trained_tokens_per_s", "loss/copy_no_think"} <= set(event)


def test_log_tells_the_flops_of_the_trained_packs(
    plain_run: Run, make_job: Callable[[PinnedRecipe, Path], TrainJob], tmp_path: Path
) -> None:
    job = make_job(plain_run.pinned, tmp_path)
    plan, shards = PackPlan.read(job.packs), [TokenShards(*folders) for folders in job.tokens]
    model, _ = load_model(job.spec.model, job.spec.tokenizer, seed=42)
    width, head = LLAMA["hidden_size"], LLAMA["vocab_size"] * LLAMA["hidden_size"]
    layers = model.num_parameters() - head  # the head is the embedding
    costs = costs_of(plan, model)
    schedule = step_packs(costs, global_batch_size=4, num_epochs=3, max_steps=None, seed=42)
    assert len(schedule) == len(plain_run.events) == 6
    for packs, event in zip(schedule, plain_run.events, strict=True):
        documents = list(documents_of(plan, shards, packs))
        lengths = np.array([len(ids) for ids, _ in documents])
        num_trained = sum(int(mask.sum()) for _, mask in documents)
        assert 0 < num_trained < lengths.sum()
        expected = 6 * (layers * lengths.sum() + 2 * width * (lengths**2).sum() + head * num_trained)
        # The time that both are divided by is rounded more than they are.
        found = event["tflops_per_s"] * 1e12 / event["tokens_per_s"]
        assert found == pytest.approx(expected / lengths.sum(), rel=0.002)


@pytest.mark.slow
def test_batch_first_is_the_one_of_packs_of_like_cost(
    train_here: Callable[..., Run], make_job: Callable[[PinnedRecipe, Path], TrainJob]
) -> None:
    # With this seed the first batch is another one without costs, and another one again when only tokens count.
    run = train_here(tiny_recipe(training={"global_batch_size": 2, "max_steps": 1, "seed": 8}))
    job = make_job(run.pinned, run.folder)
    plan, shards = PackPlan.read(job.packs), [TokenShards(*folders) for folders in job.tokens]
    model, _ = load_model(job.spec.model, job.spec.tokenizer, seed=8)

    def first_loss(costs: np.ndarray) -> float:
        (packs,) = step_packs(costs, global_batch_size=2, num_epochs=1, max_steps=1, seed=8)
        with torch.no_grad():
            nll = [
                F.cross_entropy(model(ids[None], use_cache=False).logits[0, :-1], ids[1:], reduction="none")[mask]
                for ids, mask in documents_of(plan, shards, packs)
            ]
        return torch.cat(nll).mean().item()

    tokens_only = pack_costs(plan.num_tokens, plan.offsets, linear=1.0, quadratic=0.0)
    for other in (tokens_only, np.zeros(len(plan))):
        assert first_loss(other) != pytest.approx(first_loss(costs_of(plan, model)), rel=1e-4)
    assert run.events[0]["loss"] == pytest.approx(first_loss(costs_of(plan, model)), rel=1e-6)


@pytest.mark.slow
def test_loss_turns_with_weights_count_by_them(
    train_here: Callable[..., Run], make_job: Callable[[PinnedRecipe, Path], TrainJob], tmp_path: Path
) -> None:
    turns = [{"role": "assistant", "content": "x" * 9, "weight": 0.25}, {"role": "assistant", "content": "yz" * 4}]
    asked = [{"role": "user", "content": "a"}, turns[0], {"role": "user", "content": "b"}, turns[1]]
    unweighted = [{**message, "weight": 1} if message["role"] == "assistant" else message for message in asked]
    (tmp_path / "weighted.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in (asked, unweighted)))
    recipe = tiny_recipe(
        dataset_mixture={"datasets": [{"path": str(tmp_path / "weighted.jsonl")}], "report_share": 0.0},
        training={"max_steps": 1},
    )
    recipe["dataset_mixture"]["selection_share"] = 0.0
    run = train_here(recipe)
    job = make_job(run.pinned, run.folder)
    shards = TokenShards(*job.tokens[0])
    model, _ = load_model(job.spec.model, job.spec.tokenizer, seed=job.spec.training.seed)
    total = weight = unweighted_total = count = 0.0
    for number in range(2):
        row = shards[number]
        ids, weights = torch.tensor(row.input_ids.astype("int64")), torch.tensor(row.weights[1:])
        with torch.no_grad():
            nll = F.cross_entropy(model(ids[None], use_cache=False).logits[0, :-1], ids[1:], reduction="none")
        total, weight = total + float((nll * weights).sum()), weight + float(weights.sum())
        unweighted_total, count = unweighted_total + float(nll[weights > 0].sum()), count + int((weights > 0).sum())
    assert weight < count
    assert total / weight != pytest.approx(unweighted_total / count, rel=1e-4)
    assert run.events[0]["loss"] == pytest.approx(total / weight, rel=1e-6)
