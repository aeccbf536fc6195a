"""Whether documents see each other is found out on the model at hand, and the loss is right either way."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from sft_core.data.shards.token_shards import TokenRow
from sft_core.evaluate.tasks import row_losses
from sft_core.train import probe
from sft_core.train.collate import Batch, collate
from sft_core.train.loss import Forward, trained_token_logits, trained_token_nll
from sft_core.train.models.small import one_thread, small_model
from sft_core.train.probe import Trial, class_isolation, model_isolation, settle
from tests.train.test_loss import nll_of_each, tiny_model

Documents = list[tuple[TokenRow, int]]
KEEPS_APART = ("llama", "smollm3", "qwen3", "gemma2", "gpt2", "phi3", "olmoe", "qwen3_moe", "stablelm", "cohere")
LEAKS: dict[str, dict[str, Any]] = {
    "opt": {},
    "bloom": {},
    "gpt_oss": {},
    "mpt": {},
    "mamba": {},
    "falcon_h1": {},
    "qwen3_next": {},
    "biogpt": {},
    "roberta": {"is_decoder": True},
    "falcon": {"alibi": True},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
}


@pytest.fixture(autouse=True)
def _on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


def config_of(kind: str, sizes: dict[str, Any]) -> Any:
    return AutoConfig.for_model(kind, **sizes)


def documents_of(model: Any, *lengths: int) -> Documents:
    rng, size = np.random.default_rng(1), model.config.get_text_config().vocab_size
    trained = [rng.integers(0, 2, length).astype(np.uint8) for length in lengths]
    return [
        (TokenRow(rng.integers(0, size, len(mask)).astype(np.int32), mask), number)
        for number, mask in enumerate(trained)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KEEPS_APART, *LEAKS])
def test_loss_of_a_document_is_its_own_whatever_the_architecture(kind: str) -> None:
    """The oracle is the textbook: each document by itself, by its input ids alone."""
    leaks = kind in LEAKS
    config = config_of(kind, LEAKS.get(kind, {}))
    found = class_isolation(config, attention=None, trust_remote_code=False)
    assert found is not None and (found.document_inputs is None) is leaks, found
    model = small_model(config, attention=None, trust_remote_code=False)
    documents = documents_of(model, 40, 9, 1, 71)
    with torch.no_grad():
        expected = nll_of_each(model, documents)
        nll = trained_token_nll(model, collate(documents), found.forward)
        packed = trained_token_nll(model, collate(documents), Forward("positions"))
    torch.testing.assert_close(nll, expected, atol=2e-4, rtol=2e-4)
    assert bool((packed - expected).abs().max() > 1e-3) is leaks
    rows = [row for row, _ in documents]
    sums, _ = row_losses(model, rows)
    assert sums == pytest.approx([nll_of_each(model, [(row, 0)]).sum().item() for row in rows], rel=1e-4, abs=1e-4)
    for number, row in enumerate(rows):
        assert sums[number] == pytest.approx(row_losses(model, [row])[0][0], rel=1e-4, abs=1e-4), "its neighbours count"


@pytest.mark.parametrize("document_inputs", ["positions", "bounds"])
@pytest.mark.parametrize("half", [False, True])
def test_a_planted_leak_is_found_on_the_model_itself(
    document_inputs: str, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", "varlen" if document_inputs == "bounds" else "sdpa")
    model.to(torch.bfloat16 if half else torch.float32)
    asked: dict[str, Any] = {"attention": model.config._attn_implementation, "device": "cpu", "exact": not half}
    assert model_isolation(model, None, **asked).document_inputs == document_inputs

    def as_one(batch: Batch, forward: Forward) -> Batch:
        """What a wrong mask does: all documents are one."""
        length = batch["input_ids"].shape[1]
        whole = {"position_ids": torch.arange(length)[None], "bounds": torch.tensor([0, length], dtype=torch.int32)}
        return {**batch, **whole, "lengths": np.array([length])}  # type: ignore[typeddict-item]

    inputs = probe.trained_token_logits
    monkeypatch.setattr(
        probe, "trained_token_logits", lambda model, batch, forward: inputs(model, as_one(batch, forward), forward)
    )
    found = model_isolation(model, None, **asked)
    assert found.document_inputs is None and "exchanged 0," not in found.evidence


def test_positions_that_go_on_leak_though_the_first_document_does_not_matter() -> None:
    # OPT's fault: the second document does not stand where it would alone.
    assert not Trial("positions", exchanged=0.0, alone=0.3, planted=0.3).isolates(exact=True, class_does=None)
    assert Trial("positions", exchanged=0.0, alone=1e-6, planted=0.3).isolates(exact=True, class_does=None)


@pytest.mark.parametrize(
    ("gradient", "class_does", "isolates"),
    [(0.0, None, True), (1e-9, None, False), (None, True, True), (None, None, False)],
)
def test_rounding_of_grouped_kernels_counts_where_nothing_but_it_gets_through(
    gradient: float | None, class_does: bool | None, isolates: bool
) -> None:
    trial = Trial("bounds", exchanged=4e-3, alone=5e-3, planted=1.2, gradient=gradient)
    assert trial.isolates(exact=False, class_does=class_does) is isolates


@pytest.mark.parametrize("gradient", [None, 0.0])
def test_what_is_more_than_rounding_is_a_leak_however_much_a_planted_one_stands_out(gradient: float | None) -> None:
    trial = Trial("bounds", exchanged=5e-2, alone=5e-3, planted=1.2, gradient=gradient)
    assert not trial.isolates(exact=False, class_does=True)
    in_bfloat16 = dataclasses.replace(trial, exchanged=4e-3, alone=1.5e-2)
    assert in_bfloat16.isolates(exact=False, class_does=True), "lengths round otherwise, too"


def knows_documents_by(name: str, error: Exception | None = None) -> Any:
    """A llama that tells documents apart where it is given `name`, and else takes a pack for one document.

    error: it raises that where `name` is given.
    """
    model = tiny_model("llama")

    def inputs(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        is_told = kwargs.pop(name, None) is not None
        if is_told and error is not None:
            raise error
        if not is_told:
            kwargs["position_ids"] = torch.arange(kwargs["input_ids"].shape[1])[None]
        return args, kwargs

    model.register_forward_pre_hook(inputs, with_kwargs=True)
    return model


def test_model_that_isolates_by_the_number_of_each_tokens_document_is_told_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = knows_documents_by("seq_idx")
    forward, isolation = settle(
        model, None, attention="sdpa", device="cpu", exact=True, may_fuse_head=False, router=None
    )
    assert isolation.document_inputs == forward.document_inputs == "sequences" and not forward.alone
    documents = documents_of(model, 40, 9, 1, 71)
    with torch.no_grad():
        expected = nll_of_each(tiny_model("llama"), documents)
        torch.testing.assert_close(
            trained_token_nll(model, collate(documents), forward), expected, atol=1e-4, rtol=1e-4
        )
        assert (trained_token_nll(model, collate(documents)) - expected).abs().max() > 1e-2
    monkeypatch.setattr(probe, "small_model", lambda *args, **kwargs: model)
    of_class = class_isolation(config_of("llama", {"vocab_size": 96}), attention=None, trust_remote_code=False)
    assert of_class is not None and of_class.document_inputs == "sequences"


@pytest.mark.parametrize("error", [RuntimeError("no kernel\nfor this"), AttributeError("no kernel"), KeyError()])
def test_kernel_that_fails_in_the_trial_is_no_way_to_tell_documents_apart(error: Exception) -> None:
    isolation = model_isolation(knows_documents_by("seq_idx", error), None, attention="sdpa", device="cpu", exact=True)
    assert isolation.document_inputs is None
    reason = str(error).splitlines()[0] if str(error) else "KeyError()"
    assert isolation.evidence.endswith(f"with sequences: {type(error).__name__}: {reason}")


def test_trial_without_memory_says_nothing_of_the_model() -> None:
    model = knows_documents_by("seq_idx", torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        model_isolation(model, None, attention="sdpa", device="cpu", exact=True)


def test_experts_in_half_precision_keep_documents_apart() -> None:
    config = config_of("olmoe", {})
    of_class = class_isolation(config, attention=None, trust_remote_code=False, half=True)
    model = small_model(config, attention=None, trust_remote_code=False).to(torch.bfloat16)
    found = model_isolation(model, of_class, attention="sdpa", device="cpu", exact=False)
    assert of_class is not None and of_class.document_inputs == found.document_inputs == "positions"


def test_settled_forward_of_a_leaking_model_is_documents_alone() -> None:
    model = small_model(config_of("opt", {}), attention=None, trust_remote_code=False)
    model.train()
    forward, isolation = settle(
        model, None, attention="sdpa", device="cpu", exact=True, may_fuse_head=False, router=None
    )
    assert forward.alone and isolation.document_inputs is None and "exchanged" in isolation.evidence
    assert model.training


def test_small_model_leaves_the_random_numbers_of_training_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    class_isolation(config_of("qwen2", {"hidden_size": 256}), attention=None, trust_remote_code=False)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_logits_of_documents_alone_are_those_of_the_pack_in_order(kind: str) -> None:
    model = small_model(config_of(kind, {}), attention=None, trust_remote_code=False)
    documents = documents_of(model, 12, 7, 30)
    with torch.no_grad():
        found = trained_token_logits(model, collate(documents), Forward(alone=True))
        one_by_one = [trained_token_logits(model, collate([document])) for document in documents]
    torch.testing.assert_close(found, torch.cat(one_by_one))
