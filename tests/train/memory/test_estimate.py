"""Memory and FLOPs, against sums by hand and against what a model really holds."""

import re
from typing import Any

import numpy as np
import pytest
import torch

from sft_core.data.packing.plan import PackPlan
from sft_core.rounds import ONLY
from sft_core.store.store import Store
from sft_core.train.memory.activations import Activations
from sft_core.train.memory.estimate import estimate, estimate_line
from sft_core.train.models.model import skeleton
from steps.pack import PACKED
from tests.train.tiny import LLAMA, Run, phase_recipe, tiny_recipe


def shape_of(config: dict[str, Any]) -> Any:
    return skeleton(path=None, revision=None, config=config, trust_remote_code=False)


@pytest.mark.parametrize(
    ("distributed", "ranks", "bf16", "bytes_a_parameter"),
    [
        ("ddp", 1, False, 16),
        ("ddp", 8, True, 16),
        ("zero2", 8, False, 4 + 12 / 8),
        ("zero2", 8, True, 2 + 14 / 8),
        ("zero3", 8, False, 16 / 8),
        ("zero3", 8, True, 16 / 8),
        ("fsdp2", 4, False, 16 / 4),
        ("fsdp2", 4, True, 16 / 4),
    ],
)
def test_states_are_those_of_the_formula(distributed: str, ranks: int, bf16: bool, bytes_a_parameter: float) -> None:
    runtime = {"distributed": distributed, "num_processes": ranks}
    recipe = phase_recipe(tiny_recipe(training={"bf16": bf16, "global_batch_size": 8}, runtime=runtime))
    found = estimate(recipe, shape_of(LLAMA), None)
    assert found.states == pytest.approx(found.num_parameters * bytes_a_parameter)
    assert found.flops is None


@pytest.mark.parametrize(
    ("distributed", "bf16", "bytes_a_parameter"),
    [
        ("ddp", True, 8),
        ("ddp", False, 8),
        ("zero2", True, 2 + 14 / 8),  # fp32 master weights
        ("zero3", False, 16 / 8),
        ("fsdp2", False, 8 / 8),
        ("fsdp2", True, 16 / 8),  # accelerate trains fp32 copies
    ],
)
def test_states_of_weights_in_bfloat16_are_those_of_the_formula(
    distributed: str, bf16: bool, bytes_a_parameter: float
) -> None:
    runtime = {"distributed": distributed, "num_processes": 4, "num_nodes": 2}
    training = {"bf16": bf16, "global_batch_size": 8}
    recipe = phase_recipe(tiny_recipe(model={"dtype": "bfloat16"}, training=training, runtime=runtime))
    found = estimate(recipe, shape_of(LLAMA), None)
    assert found.states == pytest.approx(found.num_parameters * bytes_a_parameter)
    assert f"by {distributed} on 8 rank(s)" in estimate_line(found, recipe)


def test_states_of_lora_over_weights_in_bfloat16_are_those_weights() -> None:
    training = {"lora": {"r": 4}}
    recipe = phase_recipe(tiny_recipe(model={"dtype": "bfloat16"}, training=training))
    found = estimate(recipe, shape_of(LLAMA), None)
    assert found.states == found.num_parameters * 2
    assert estimate(phase_recipe(tiny_recipe(training=training)), shape_of(LLAMA), None).states == 2 * found.states


@pytest.mark.parametrize(
    ("tokens", "attention", "packs"),
    [
        *[(2 * 384, "varlen", 2), (4 * 384 - 1, "varlen", 2), (10_000, "varlen", 4), (100, "varlen", 1)],
        *[("auto", "varlen", 1), (10_000, "sdpa", 1)],
    ],
)
def test_activations_are_those_of_the_packs_of_a_forward(tokens: int | str, attention: str, packs: int) -> None:
    def of(tokens: int | str, max_length: int) -> Any:
        data = tiny_recipe(model={"attn_implementation": attention}, packing={"max_length": max_length})
        data["runtime"]["tokens_per_forward"] = tokens
        recipe = phase_recipe(data)
        return estimate(recipe, shape_of(LLAMA), None), recipe

    found, recipe = of(tokens, 384)
    assert found.packs_a_forward == packs
    assert found.activations == of("auto", packs * 384)[0].activations
    named = "a pack" if packs == 1 else f"{packs} packs"
    assert f"for the activations of {named} of 384 tokens" in estimate_line(found, recipe)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_of_plain_training_are_what_torch_holds(dtype: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(LLAMA)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    held = sum(p.nbytes + p.grad.nbytes for p in model.parameters())
    held += sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.ndim)
    assert estimate(phase_recipe(tiny_recipe(model={"dtype": dtype})), shape_of(LLAMA), None).states == held


@pytest.mark.slow
def test_flops_are_those_that_the_run_counted(plain_run: Run, store: Store) -> None:
    plan = PackPlan.read(store.path(store.ensure(PACKED, plain_run.pinned)))
    found = estimate(plain_run.pinned.recipe.for_phase(ONLY), shape_of(LLAMA), plan, trained_share=0.25)
    head = LLAMA["vocab_size"] * LLAMA["hidden_size"]  # which is the embedding
    lengths = plan.num_tokens.astype(float)
    an_epoch = 6 * ((found.num_parameters - head + head / 4) * lengths + 2 * 32 * lengths**2)
    assert found.flops == pytest.approx(3 * float(np.sum(an_epoch)))
    assert "FLOPs in all" in estimate_line(found, plain_run.pinned.recipe.for_phase(ONLY))


@pytest.mark.slow
def test_checkpointing_and_qlora_take_less() -> None:
    def of(**training: Any) -> Any:
        return estimate(phase_recipe(tiny_recipe(training=training)), shape_of(LLAMA), None)

    assert of(gradient_checkpointing=True).activations.layers < of().activations.layers
    assert of(lora={"load_in_4bit": True}).states < of(lora={}).states < of().states
    of_lora, of_qlora = (of(bf16=True, lora=lora).activations for lora in ({}, {"load_in_4bit": True}))
    assert of_qlora.total < of_lora.total < of(bf16=True).activations.total
    # Copies of frozen weights are for the gradients of what goes into them, which the first queries, keys and values
    # have none of.
    assert of_lora.weight_copies - of_qlora.weight_copies == 2 * (2 * (4 * 32 * 32 + 3 * 32 * 64) - 3 * 32 * 32)


@pytest.mark.parametrize(
    ("distributed", "has_copies", "share"), [("ddp", True, 1), ("fsdp2", False, 0.95), ("zero2", False, 0.95)]
)
def test_activations_are_those_of_weights_as_the_strategy_computes_with_them(
    distributed: str, has_copies: bool, share: float
) -> None:
    def of(distributed: str) -> Activations:
        runtime = {"distributed": distributed, "num_processes": 2}
        config = {**LLAMA, "hidden_size": 128, "intermediate_size": 512}
        found = estimate(phase_recipe(tiny_recipe(training={"bf16": True}, runtime=runtime)), shape_of(config), None)
        assert found.activations is not None
        return found.activations

    assert (of(distributed).weight_copies > 0) == has_copies
    assert of(distributed).total <= share * of("ddp").total


def test_estimate_line_names_the_parts_that_there_are() -> None:
    def line_of(attention: str, *, bf16: bool) -> str:
        recipe = phase_recipe(tiny_recipe(model={"attn_implementation": attention}, training={"bf16": bf16}))
        return estimate_line(estimate(recipe, shape_of(LLAMA), None), recipe)

    size = r"[\d.]+ [KM]iB"
    whole = rf"{size} for the activations of a pack of 384 tokens \({size} of the layers, {size} of 16-bit copies of "
    whole += rf"weights, {size} of the attention's mask, {size} of the head\)$"
    assert re.search(whole, line_of("sdpa", bf16=True))
    without = line_of("flash_attention_2", bf16=False)
    assert re.search(rf"\({size} of the layers, {size} of the head\)$", without)


@pytest.mark.slow
def test_activations_of_a_model_that_does_not_run_without_memory_are_told_to_be_unknown() -> None:
    recipe = phase_recipe(tiny_recipe())
    # Without its kernels it goes through the tokens one by one.
    found = estimate(recipe, shape_of({"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 2}), None)
    assert found.activations is None and found.states > 0
    assert "the memory of activations is unknown (MambaForCausalLM does not run on fake tensors" in estimate_line(
        found, recipe
    )
