"""Varlen attention: what the model's own says, and refused where it would say something else."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sft_core.train.collate import collate, documents_alone
from sft_core.train.loss import Forward, trained_token_nll
from sft_core.train.models.attention import NotByVarlen, allows_varlen, choose_attention, varlen_attention
from tests.train.test_loss import SIZES, nll_of_each, random_documents

WINDOW = 7
KINDS = {
    "llama": {},  # grouped queries
    "smollm3": {},  # layers without positions
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": WINDOW},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    },
}


def model_of(kind: str, attention: str, **sizes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **KINDS.get(kind, {}), **sizes})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [(29, 5, 1, 14, 2), (16, 16, 16, 16), (64,)], ids=str)
def test_varlen_packed_is_each_document_by_the_models_own_attention(kind: str, lengths: tuple[int, ...]) -> None:
    documents, found = random_documents(*lengths), {}
    for attention in ("varlen", "sdpa"):
        model = model_of(kind, attention)
        assert model.config._attn_implementation == attention
        if attention == "varlen":
            nll = trained_token_nll(model, collate(documents), Forward("bounds"))
        else:
            nll = nll_of_each(model, documents)
        nll.sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert all(value is not None for value in gradients.values())
        found[attention] = {"nll": nll.detach(), **gradients}
    assert len(found["sdpa"]["nll"]) > 8
    torch.testing.assert_close(found["varlen"], found["sdpa"], atol=2e-5, rtol=1e-4)


def test_varlen_window_is_felt() -> None:
    documents = random_documents(40)
    found = [
        trained_token_nll(model_of("mistral", "varlen", sliding_window=window), collate(documents), Forward("bounds"))
        for window in (WINDOW, None)
    ]
    assert (found[0] - found[1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"softcap": 30.0}, "softcap"),
        ({"attention_mask": torch.ones(1, 1, 5, 5)}, "a mask"),
        ({"key": torch.zeros(1, 2, 9, 8), "value": torch.zeros(1, 2, 9, 8)}, "a cache"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "later tokens"),
        (
            {"query": torch.zeros(1, 2, 5, 264), "key": torch.zeros(1, 2, 5, 264), "value": torch.zeros(1, 2, 5, 264)},
            "heads of 264",
        ),
        ({"value": torch.zeros(1, 2, 5, 4)}, "another size"),
        ({"cu_seq_lens_q": None}, "bounds"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_varlen_refuses_what_its_kernel_leaves_out(changes: dict[str, Any], refused: str) -> None:
    states = torch.zeros(1, 2, 5, 8)
    arguments = {"query": states, "key": states, "value": states, "attention_mask": None}
    bounds = {"cu_seq_lens_q": torch.tensor([0, 5], dtype=torch.int32), "max_length_q": 5}
    arguments |= bounds | changes
    (*positional,) = (arguments.pop(name) for name in ("query", "key", "value", "attention_mask"))
    with pytest.raises(NotByVarlen, match=refused):
        varlen_attention(torch.nn.Module(), *positional, **arguments)


def test_kernel_gets_half_precision_windows_and_grouped_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches PyTorch's kernel, which runs on a GPU alone: both generations of its signature."""
    from sft_core.train.models import attention

    calls: list[dict[str, Any]] = []

    def kernel(
        query: Any, key: Any, value: Any, *bounds: Any, scale: Any, window_size: Any, enable_gqa: bool = False
    ) -> Any:
        calls.append({"key": key, "dtype": query.dtype, "window": window_size, "gqa": enable_gqa, "scale": scale})
        return query

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    query, key = torch.randn(6, 4, 8), torch.randn(6, 2, 8)
    bounds = torch.tensor([0, 4, 6], dtype=torch.int32)
    with pytest.raises(NotByVarlen, match="float32"):
        attention._by_kernel(query, key, key, bounds, 4, 0.5, (-1, 0))
    for takes_groups in (True, False):
        options = frozenset({"enable_gqa"} if takes_groups else ())
        monkeypatch.setattr(attention, "_kernel_options", lambda options=options: options)
        half = [states.bfloat16() for states in (query, key, key)]
        attention._by_kernel(*half, bounds, 4, 0.5, (6, 0))
        assert calls[-1]["dtype"] == torch.bfloat16 and calls[-1]["window"] == (6, 0) and calls[-1]["scale"] == 0.5
        assert calls[-1]["gqa"] == takes_groups
        heads = key.bfloat16() if takes_groups else key.bfloat16().repeat_interleave(2, dim=1)
        assert torch.equal(calls[-1]["key"], heads)


@pytest.mark.parametrize(
    ("kind", "allowed"),
    [
        *[(kind, True) for kind in ("llama", "smollm3", "qwen3_moe", "mistral", "gemma3_text")],
        # soft-capping, sinks, alibi, a class of its own, no attention, heads over 256
        *[(kind, False) for kind in ("gemma2", "gpt_oss", "mpt", "bloom", "mamba", "gemma")],
    ],
)
def test_auto_on_a_gpu_takes_varlen_where_the_class_allows_it(
    kind: str, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AutoConfig.for_model(kind, **({"head_dim": 512} if kind == "gemma" else {}))
    assert allows_varlen(config) is allowed
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_attention("auto", config, half=True) == ("varlen" if allowed else None)
    assert choose_attention("auto", config, half=False) is None, "its kernels take half precision alone"
    assert choose_attention("eager", config, half=True) == "eager"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_attention("auto", config, half=True) is None


def test_dropout_of_attention_is_not_varlens() -> None:
    assert not allows_varlen(AutoConfig.for_model("llama", attention_dropout=0.1))


def test_alone_by_varlen_is_packed_by_varlen() -> None:
    batch, model = collate(random_documents(9, 5, 14)), model_of("llama", "varlen")
    packed = trained_token_nll(model, batch, Forward("bounds"))
    assert len(list(documents_alone(batch))) == 3
    np.testing.assert_allclose(
        trained_token_nll(model, batch, Forward("bounds", alone=True)).detach(), packed.detach(), atol=1e-5
    )


def test_checkpoint_of_a_varlen_model_names_no_attention(tmp_path: Any) -> None:
    model_of("llama", "varlen").save_pretrained(tmp_path)
    assert "varlen" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
