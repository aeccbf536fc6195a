"""The router's loss of a mixture of experts: transformers' on one pack, and the same however a batch is divided."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.olmoe import modeling_olmoe

from sft_core.data.packing.plan import PackPlan
from sft_core.data.shards.token_shards import TokenRow, TokenShards
from sft_core.pins.pinned import PinnedRecipe
from sft_core.store.store import Store
from sft_core.train.collate import collate
from sft_core.train.job import TrainJob
from sft_core.train.loss import Forward, trained_losses
from sft_core.train.models.model import load_model
from sft_core.train.models.router import router_loss
from sft_core.train.preflight import try_class
from sft_core.train.schedule import EMPTY, step_packs
from tests.train.test_objective import costs_of, documents_of
from tests.train.test_strategies import trained
from tests.train.tiny import LLAMA, Run, phase_recipe, tiny_recipe

KINDS = ("olmoe", "qwen3_moe", "mixtral", "gpt_oss")
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "head_dim": 16,
}
COEFFICIENT = 0.5


def moe(kind: str) -> dict[str, Any]:
    return {**LLAMA, **EXPERTS, "model_type": kind, "attention_dropout": 0.0}


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    settings = {**moe(kind), "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings)).eval()


def packs_of(*sizes: tuple[int, ...]) -> list[list[tuple[TokenRow, int]]]:
    rng = np.random.default_rng(0)
    return [
        [(TokenRow(rng.integers(0, 291, n).astype(np.int32), np.ones(n, np.uint8)), 0) for n in lengths]
        for lengths in sizes
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_router_loss_of_a_pack_is_transformers_own(kind: str) -> None:
    model = model_of(kind)
    router = router_loss(model.config, COEFFICIENT)
    (pack,) = packs_of((40,))
    batch = collate(pack)
    found = trained_losses(model, batch, Forward(router=router)).router
    own = model(input_ids=batch["input_ids"], use_cache=False, output_router_logits=True).aux_loss
    assert found is not None and float(own) > 0.1
    assert float(found) / 40 == pytest.approx(float(own), rel=1e-6)
    gates = [value for name, value in model.named_parameters() if "gate.w" in name or "router.w" in name]
    assert len(gates) == 2
    gradient, expected = (torch.autograd.grad(loss, gates) for loss in (found / 40, own))
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("alone", [False, True])
def test_router_loss_counts_each_pack_by_its_tokens(alone: bool) -> None:
    model = model_of("olmoe")
    packs = packs_of((20, 9), (31,), (5, 6, 7))
    forward = Forward(alone=alone, router=router_loss(model.config, COEFFICIENT))
    together = trained_losses(model, collate(*packs), forward).router
    whole = dataclasses.replace(forward, alone=False)
    one_by_one = [float(trained_losses(model, collate(pack), whole).router) for pack in packs]
    assert float(together) == pytest.approx(sum(one_by_one), rel=1e-5)
    sizes = [sum(len(row.input_ids) for row, _ in pack) for pack in packs]
    assert len({round(loss / size, 4) for loss, size in zip(one_by_one, sizes, strict=True)}) == 3
    assert float(trained_losses(model, collate(), forward).router) == 0


def recipe(**changes: dict[str, Any]) -> dict[str, Any]:
    training = {"max_steps": 3, "router_aux_loss_coef": COEFFICIENT, **changes.get("training", {})}
    return tiny_recipe(model={"config": moe("olmoe")}, **{**changes, "training": training})


def losses_of(run: Run) -> list[float]:
    return [event["loss"] for event in run.events]


@pytest.mark.long
def test_training_adds_the_router_loss_and_more_ranks_change_nothing(
    train_here: Callable[..., Run], store: Store, tmp_path: Path
) -> None:
    with_loss, without = train_here(recipe()), train_here(recipe(training={"router_aux_loss_coef": 0.0}))
    for step, (more, less) in enumerate(zip(losses_of(with_loss), losses_of(without), strict=True)):
        assert more - less > 0.3 * COEFFICIENT, f"{step=}"
    first = [run.events[0] for run in (with_loss, without)]
    by_source = [[value for name, value in event.items() if name.startswith("loss/")] for event in first]
    assert by_source[0] == by_source[1], "the loss of tokens is told by itself"
    two = trained(store, recipe(runtime={"num_processes": 2}), tmp_path / "two")
    assert losses_of(two) == pytest.approx(losses_of(with_loss), rel=1e-5)
    by_varlen = {"model": {"config": moe("olmoe"), "attn_implementation": "varlen"}}
    merged = recipe(runtime={"tokens_per_forward": 2 * 384})
    merged["model"] |= by_varlen["model"]
    assert losses_of(train_here(merged)) == pytest.approx(losses_of(with_loss), rel=1e-5)
    config = json.loads((with_loss.model / "config.json").read_text())
    assert config["router_aux_loss_coef"] == AutoConfig.for_model("olmoe").router_aux_loss_coef


@pytest.mark.slow
def test_router_loss_of_a_step_is_the_mean_over_the_tokens_of_its_packs(
    train_here: Callable[..., Run], make_job: Callable[[PinnedRecipe, Path], TrainJob]
) -> None:
    """Of each step of an epoch, the last of which has an empty slot; by transformers' own loss of each pack."""
    still = {"learning_rate": 1e-12, "max_steps": 2}  # so that the start model is that of both steps
    runs = [train_here(recipe(training={**still, "router_aux_loss_coef": value})) for value in (COEFFICIENT, 0.0)]
    job = make_job(runs[0].pinned, runs[0].folder)
    plan, shards = PackPlan.read(job.packs), [TokenShards(*folders) for folders in job.tokens]
    model, _ = load_model(job.spec.model, job.spec.tokenizer, seed=42)
    schedule = step_packs(costs_of(plan, model), global_batch_size=4, num_epochs=1, max_steps=2, seed=42)
    assert (schedule == EMPTY).any()
    for step, packs in enumerate(schedule):
        total = num_tokens = 0.0
        for pack in packs[packs != EMPTY]:
            ids = [ids for ids, _ in documents_of(plan, shards, np.array([pack]))]
            positions = torch.cat([torch.arange(len(document)) for document in ids])
            with torch.no_grad():
                aux = model(
                    input_ids=torch.cat(ids)[None],
                    position_ids=positions[None],
                    use_cache=False,
                    output_router_logits=True,
                ).aux_loss
            total, num_tokens = total + float(aux) * len(positions), num_tokens + len(positions)
        added = losses_of(runs[0])[step] - losses_of(runs[1])[step]
        assert added == pytest.approx(COEFFICIENT * total / num_tokens, rel=1e-4), f"{step=}"


def test_default_is_the_models_own_coefficient_and_a_dense_model_has_none() -> None:
    own = router_loss(AutoConfig.for_model("olmoe"), None)
    assert own is not None and own.coefficient == AutoConfig.for_model("olmoe").router_aux_loss_coef > 0
    assert router_loss(AutoConfig.for_model("olmoe"), 0.0) is None
    assert router_loss(AutoConfig.for_model("llama"), None) is None
    with pytest.raises(ValueError, match="a llama model gives no router's logits; remove it"):
        router_loss(AutoConfig.for_model("llama"), 0.1)


def test_router_loss_asked_of_a_dense_model_is_refused_before_any_work() -> None:
    data = tiny_recipe(training={"router_aux_loss_coef": 0.1})
    loader = {"path": None, "revision": None, "config": data["model"]["config"], "trust_remote_code": False}
    with pytest.raises(ValueError, match="remove it"):
        try_class(phase_recipe(data), loader)


def test_router_loss_that_a_class_computes_otherwise_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loader = {"path": None, "revision": None, "config": moe("olmoe"), "trust_remote_code": False}
    asked, without = (phase_recipe(recipe(training={"router_aux_loss_coef": value})) for value in (COEFFICIENT, 0.0))
    assert try_class(asked, loader).warnings == []
    own = modeling_olmoe.load_balancing_loss_func
    monkeypatch.setattr(modeling_olmoe, "load_balancing_loss_func", lambda *args, **kwargs: 2 * own(*args, **kwargs))
    with pytest.raises(
        ValueError, match=r"router's loss of a olmoe model is .* and sft-flow computes .* does not support this loss"
    ):
        try_class(asked, loader)
    assert try_class(without, loader).warnings == []
