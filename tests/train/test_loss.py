"""Logits for trained positions alone, and documents of a pack that do not see each other."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sft_core.data.shards.token_shards import TokenRow
from sft_core.train.collate import collate
from sft_core.train.loss import Forward, LossBySource, trained_token_nll
from sft_core.train.models.head import add_fused_head

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,  # SmolLM3 leaves out the rotary embedding in every fourth layer
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MODELS = [(kind, attention) for kind in ("llama", "smollm3", "qwen2") for attention in ("sdpa", "eager")]
FORWARD = [*MODELS, ("llama", "flex_attention")]  # which has no backward pass on a CPU


def tiny_model(kind: str, attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def random_documents(*lengths: int) -> list[tuple[TokenRow, int]]:
    rng = np.random.default_rng(0)
    return [
        (TokenRow(rng.integers(1, VOCABULARY, n).astype(np.int32), rng.integers(0, 2, n).astype(np.uint8)), i)
        for i, n in enumerate(lengths)
    ]


def nll_of_each(model: PreTrainedModel, documents: list[tuple[TokenRow, int]]) -> torch.Tensor:
    """By the textbook: every document by itself, all logits, labels shifted by one."""
    found = []
    for row, _ in documents:
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
        nll = F.cross_entropy(model(ids, use_cache=False).logits[0, :-1], ids[0, 1:], reduction="none")
        found.append(nll[torch.from_numpy(row.trained[1:]) == 1])
    return torch.cat(found)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "attention"), FORWARD)
@pytest.mark.parametrize("lengths", [(9, 5, 1, 14, 2), (16, 16, 16, 16), (63, 1), (64,)], ids=str)
@torch.no_grad()
def test_nll_packed_is_that_of_documents_by_themselves(kind: str, attention: str, lengths: tuple[int, ...]) -> None:
    model, documents = tiny_model(kind, attention), random_documents(*lengths)
    # torch 2.13 compiles flex attention on a CPU for a minute, and for a second shape to C++ that is wrong.
    with torch.compiler.set_stance("force_eager"):
        nll_N = trained_token_nll(model, collate(documents))
        expected = nll_of_each(model, documents)
    assert len(expected) > 8
    torch.testing.assert_close(nll_N, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "attention"), MODELS)
@pytest.mark.parametrize("fault", [{"use_cache": True}, {"use_cache": False, "attention_mask": "ones"}])
@torch.no_grad()
def test_nll_with_cache_or_mask_leaks(kind: str, attention: str, fault: dict[str, Any]) -> None:
    # What the loss keeps away from, so that the test above is seen to be able to fail.
    model, documents = tiny_model(kind, attention), random_documents(9, 5, 1, 14, 2)
    batch = collate(documents)
    if "attention_mask" in fault:
        fault = {**fault, "attention_mask": torch.ones_like(batch["input_ids"])}
    logits = model(batch["input_ids"], position_ids=batch["position_ids"], **fault).logits[0, batch["targets"] - 1]
    leaked = F.cross_entropy(logits, batch["target_ids"], reduction="none") - nll_of_each(model, documents)
    assert leaked.abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["llama", "smollm3", "qwen2"])
def test_nll_fused_head_equals_plain_with_its_gradients(kind: str) -> None:
    model, batch = tiny_model(kind), collate(random_documents(9, 5, 1, 14, 2))

    def loss_and_gradients(fused: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        nll_N = trained_token_nll(model, batch, Forward(fused_head=fused))
        nll_N.sum().backward()
        return nll_N.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain, plain_gradients = loss_and_gradients(False)
    add_fused_head(model)
    fused, fused_gradients = loss_and_gradients(True)
    assert len(plain) > 8
    assert len(plain_gradients) > 20
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fused_gradients, plain_gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_nll_empty_slot_gives_a_zero_gradient_to_every_weight(fused: bool) -> None:
    # A rank whose slot is empty takes part in the all-reduce: a weight without a gradient would hang the others.
    model = tiny_model("llama")
    add_fused_head(model)
    nll_N = trained_token_nll(model, collate([]), Forward(fused_head=fused))
    assert len(nll_N) == 0
    nll_N.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert gradients
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_loss_by_source_two_batches_is_the_mean_of_each() -> None:
    losses = LossBySource(3)
    losses.add(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 0, 2]))
    losses.add(torch.tensor([3.0]), torch.tensor([0]))
    means, counts = losses.take(lambda sums: sums)
    assert counts == [3, 0, 1]
    assert (means[0], means[2]) == (2.0, 6.0)
    losses.add(torch.tensor([5.0]), torch.tensor([1]))
    means, counts = losses.take(lambda sums: 2 * sums)  # two ranks with the same
    assert (means[1], counts) == (5.0, [0, 2, 0])
