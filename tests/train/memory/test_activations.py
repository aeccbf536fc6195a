"""Memory that is counted without any, against what torch allocates in a real forward and backward pass.

On a CPU torch's profiler tells each allocation, and the count is of the same operations: they agree within 3 %, which
is left for buffers inside of a CPU's kernels. What stands in for CUDA's is held against sums by hand and TRL's code.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.liger import apply_liger_kernel
from transformers.models.llama import modeling_llama
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from sft_core.data.shards.token_shards import TokenRow
from sft_core.train.collate import Batch, collate, to_device
from sft_core.train.loss import Forward, trained_token_nll
from sft_core.train.memory import fake_cuda
from sft_core.train.memory.activations import Activations, UnknownActivations, activation_bytes
from sft_core.train.models.head import add_fused_head
from sft_core.train.models.model import skeleton

SIZES = {
    "vocab_size": 500,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
OWN: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 256},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "opt": {"ffn_dim": 512, "word_embed_proj_dim": 128},
    "gpt2": {"n_positions": 2048},
}
MODELS = ["llama", "smollm3", "qwen2", "phi", *OWN]
LENGTHS = (150, 100, 1, 125, 136)
MIB = 2**20


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # beside other processes two take longer
    yield
    torch.set_num_threads(before)


def config_of(kind: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": kind, **SIZES, **OWN.get(kind, {}), **changes}


def shape_of(config: dict[str, Any]) -> Any:
    return skeleton(path=None, revision=None, config=config, trust_remote_code=False)


def model_of(config: dict[str, Any], **options: Any) -> Any:
    settings = dict(config)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings), **options)


def batch_of(*lengths: int, trained_share: float = 0.5) -> Batch:
    rng, documents = np.random.default_rng(0), []
    for length in lengths:
        trained = (rng.random(length) < trained_share).astype(np.uint8)
        documents.append((TokenRow(rng.integers(1, 500, length).astype(np.int32), trained), 0))
    return collate(documents)


def share_of(batch: Batch) -> float:
    return int(batch["num_targets"].sum()) / (batch["input_ids"].numel() - 1)


def train_once(model: Any, batch: Batch, *, fused: bool = False) -> None:
    trained_token_nll(model, batch, Forward(fused_head=fused)).sum().backward()


def autocast_as_accelerate(model: Any) -> None:
    model.forward = torch.autocast(model.device.type, torch.bfloat16)(model.forward)


def peak_of(model: Any, batch: Batch, *, fused: bool = False) -> int:
    """The most bytes that a forward and backward pass holds at once beside gradients that are there before."""
    train_once(model.train(), batch, fused=fused)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        train_once(model, batch, fused=fused)
    assert found.profiler is not None
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert min(changes) < 0 < max(changes)
    return int(np.cumsum(changes).max())


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointing"])
@pytest.mark.parametrize(
    ("kind", "bf16"), [*((kind, True) for kind in MODELS), *((kind, False) for kind in ("llama", "qwen3_moe", "gpt2"))]
)
def test_count_is_what_torch_allocates(kind: str, bf16: bool, checkpointing: bool) -> None:
    config, batch = config_of(kind), batch_of(*LENGTHS)
    attention = "eager" if kind == "gemma2" else "sdpa"  # it has no other
    model = model_of(config, attn_implementation=attention)
    if checkpointing:
        model.activation_checkpointing_enable()
    if bf16:
        autocast_as_accelerate(model)
    found = activation_bytes(
        shape_of(config),
        tokens=sum(LENGTHS),
        bf16=bf16,
        checkpointing=checkpointing,
        attention=attention,
        trained_share=share_of(batch),
        device="cpu",
    )
    measured = peak_of(model, batch)
    assert measured > 4 * MIB
    assert found.total == pytest.approx(measured, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointing"])
def test_count_with_lora_is_what_torch_allocates(checkpointing: bool) -> None:
    config, batch = config_of("llama"), batch_of(*LENGTHS)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=8)
    model = model_of(config)
    adapted = get_peft_model(model, lora)
    if checkpointing:
        adapted.enable_input_require_grads()
        model.activation_checkpointing_enable()
    autocast_as_accelerate(model)
    options = {"tokens": sum(LENGTHS), "bf16": True, "checkpointing": checkpointing, "attention": "sdpa"}
    options |= {"trained_share": share_of(batch), "device": "cpu"}
    found = activation_bytes(shape_of(config), **options, lora=lora)
    assert found.total == pytest.approx(peak_of(model, batch), rel=0.03)
    if not checkpointing:
        assert found.total < 0.95 * activation_bytes(shape_of(config), **options).total


def on_cuda(kind: str = "llama", *, tokens: int = 512, **options: Any) -> Activations:
    changes = options.pop("config", {})
    # Few trained tokens, so that the head is small beside the layers.
    defaults = {"bf16": True, "checkpointing": False, "attention": "varlen", "trained_share": 0.02}
    return activation_bytes(shape_of(config_of(kind, **changes)), tokens=tokens, **{**defaults, **options})


def test_count_changes_nothing_of_the_shape() -> None:
    shape = shape_of(config_of("llama"))
    before = (shape.config.to_dict(), {name: (p.device, p.dtype) for name, p in shape.named_parameters()})
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    options = {"tokens": 64, "bf16": True, "attention": "varlen", "dtype": "bfloat16", "liger": True, "lora": lora}
    assert activation_bytes(shape, checkpointing=True, **options).total > 0
    assert (shape.config.to_dict(), {name: (p.device, p.dtype) for name, p in shape.named_parameters()}) == before
    assert shape.config._attn_implementation == "sdpa" and all(p.requires_grad for p in shape.parameters())


def test_layers_grow_with_the_tokens_and_copies_of_weights_do_not() -> None:
    one, two = (on_cuda(tokens=tokens) for tokens in (2048, 4096))
    assert two.layers == pytest.approx(2 * one.layers, rel=0.05)
    assert one.weight_copies == pytest.approx(two.weight_copies, rel=0.2) and one.weight_copies > 2 * MIB / 4


@pytest.mark.slow
@pytest.mark.parametrize(("bf16", "width"), [(True, 2), (False, 4)])
def test_mask_of_sdpa_on_cuda_is_one_of_the_compute_dtype_in_each_layer(bf16: bool, width: int) -> None:
    assert on_cuda(bf16=bf16, attention="sdpa").mask == 4 * width * 512 * 512
    assert on_cuda(bf16=bf16).mask == 0
    once = on_cuda(bf16=bf16, attention="sdpa", checkpointing=True, tokens=1024).mask
    assert once == (1 + width) * 1024 * 1024, "that of all layers, and the copy of one"


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointing"])
def test_attention_that_knows_documents_keeps_what_a_flash_kernel_keeps(checkpointing: bool) -> None:
    # torch's own for a CPU does, for one document, which needs no mask: queries, keys, values, output, sums. Without
    # shared keys, of which a kernel on CUDA makes copies.
    config, batch = config_of("llama", num_key_value_heads=8), batch_of(1024, trained_share=0.02)
    model = model_of(config, attn_implementation="sdpa")
    if checkpointing:
        model.activation_checkpointing_enable()
    found = on_cuda(config={"num_key_value_heads": 8}, tokens=1024, bf16=False, checkpointing=checkpointing)
    assert found.head < 0.2 * found.layers
    assert found.total == pytest.approx(peak_of(model, batch), rel=0.15)


def test_attention_keeps_its_parts_in_16_bits() -> None:
    def kept(tokens: int, **options: Any) -> float:
        return on_cuda(tokens=tokens, config={"num_hidden_layers": 1}, **options).layers

    plain, wide = (on_cuda(config={"num_hidden_layers": n}, tokens=2048).layers for n in (1, 2))
    a_layer = (wide - plain) / 2048
    hidden, keys, middle = 128, 32, 352
    residuals = 2 * 4 * hidden  # the float32 sums after attention and MLP
    norms = 2 * (4 * hidden + 4)
    copies = 2 * (3 * hidden + 2 * hidden)  # of the norms' outputs, for each linear layer
    attention = 2 * (hidden + keys + keys + hidden) + 4 * 8  # queries, keys, values, output, sums of 8 heads
    mlp = 2 * 4 * middle  # gate, its activation, up, their product
    assert a_layer == pytest.approx(residuals + norms + copies + attention + mlp, rel=0.02)


@pytest.mark.slow
def test_liger_keeps_no_normalized_states_and_no_activation_of_the_gate() -> None:
    def a_layer(liger: bool) -> float:
        one, two = (on_cuda(config={"num_hidden_layers": n}, tokens=2048, liger=liger).layers for n in (1, 2))
        return (two - one) / 2048

    assert a_layer(False) - a_layer(True) == pytest.approx(2 * 4 * 128 + 2 * 352, rel=0.02)
    assert on_cuda("phi", liger=True) == on_cuda("phi"), "Liger does not know it"


def test_dropout_on_cuda_keeps_booleans() -> None:
    def layers(kind: str, share: float) -> float:
        return on_cuda(kind, config={"resid_pdrop": share, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, tokens=1024).layers

    assert layers("gpt2", 0.1) - layers("gpt2", 0.0) == pytest.approx(2 * 4 * 1024 * 128, rel=0.15)


@pytest.mark.parametrize("is_frozen", [False, True], ids=["trained", "frozen"])
def test_head_on_cuda_is_that_of_trl(is_frozen: bool) -> None:
    # Few tokens and a large vocabulary: TRL's own code for a CPU copies tiles that its kernels do not.
    config, batch = (
        config_of("llama", vocab_size=60_000, num_hidden_layers=1, tie_word_embeddings=False),
        batch_of(6, trained_share=1.0),
    )
    model, shape = model_of(config), shape_of(config)
    model.lm_head.weight.requires_grad_(not is_frozen)
    shape.lm_head.weight.requires_grad_(not is_frozen)
    add_fused_head(model)
    found = activation_bytes(shape, tokens=6, bf16=False, checkpointing=False, attention="sdpa")
    gradient = 4 * 128 * 60_000
    assert (found.head > gradient) != is_frozen
    # The embedding's own gradient is as large, and comes last.
    assert found.total == pytest.approx(peak_of(model, batch, fused=True), rel=0.15)


def test_sizes_of_the_heads_tiles_are_those_of_trl() -> None:
    assert chunked_logprob.TOKEN_CHUNK_SIZE == fake_cuda.TOKEN_CHUNK
    assert trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE == fake_cuda.VOCABULARY_CHUNK


def test_operations_in_float32_are_those_of_torchs_autocast() -> None:
    header = (Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h").read_text()

    def listed(name: str) -> set[str]:
        (body,) = re.findall(rf"#define {name}\(_\)(.*?)\n\n", header, re.DOTALL)
        names = set(re.findall(r"_\((\w+)", body))
        return {name for name in names if not re.search(r"loss|upsample|_norm$|dist|renorm|kl_div|binary", name)} | {
            name for name in names if name in ("layer_norm", "native_layer_norm", "rms_norm", "group_norm")
        }

    later = {"rms_norm"} - listed("AT_FORALL_FP32")  # than torch 2.11, which has it in the input's own precision
    assert listed("AT_FORALL_FP32") == fake_cuda.FLOAT32_INPUTS - {"__rpow__"} - later
    norms = {"norm", "linalg_vector_norm", "linalg_matrix_norm"}
    assert listed("AT_FORALL_FP32_SET_OPT_DTYPE") == fake_cuda.FLOAT32_RESULTS - norms


def test_autocast_on_cuda_takes_powers_in_float32() -> None:
    # GPT-2's GELU takes a power, and float32 spreads from there: a CPU stays in 16 bits.
    def a_layer(**options: Any) -> float:
        one, two = (
            activation_bytes(
                shape_of(config_of("gpt2", n_layer=n, num_hidden_layers=n, n_inner=4096, attn_pdrop=0.0)),
                tokens=1024, bf16=True, checkpointing=False, attention="sdpa", trained_share=0.01, **options,
            ).layers
            for n in (1, 2)
        )  # fmt: skip
        return (two - one) / 1024 / 4096

    assert a_layer(device="cuda") - a_layer(device="cpu") > 4


def test_model_whose_code_fails_is_unknown_with_the_reason() -> None:
    with pytest.raises(UnknownActivations, match=r"Gemma2ForCausalLM does not run on fake tensors: .*softcap"):
        on_cuda("gemma2", attention="sdpa")


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointing"])
@pytest.mark.parametrize(("kind", "liger"), [("llama", False), ("qwen3", False), ("llama", True)])
def test_count_is_what_a_gpu_holds(
    kind: str, liger: bool, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = {"vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8}
    own = {"head_dim": 128} if kind == "qwen3" else {}
    config, batch = config_of(kind, **large, **own, max_position_embeddings=4096), batch_of(1500, 1000, 500, 1096)
    found = activation_bytes(
        shape_of(config),
        tokens=4096,
        bf16=True,
        checkpointing=checkpointing,
        attention="sdpa",
        trained_share=share_of(batch),
        liger=liger,
    )
    model = model_of(config, attn_implementation="sdpa").to("cuda").train()
    add_fused_head(model)
    if checkpointing:
        model.activation_checkpointing_enable()
    if liger:
        for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # which Liger replaces for later models too
            monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
        apply_liger_kernel(model, {"fused_linear_cross_entropy": False})
    autocast_as_accelerate(model)
    batch = to_device(batch, "cuda")
    train_once(model, batch, fused=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train_once(model, batch, fused=True)
    assert found.total == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.15)
