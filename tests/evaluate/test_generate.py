from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from sft_core.data.shards.token_shards import TokenRow
from sft_core.evaluate import generate
from sft_core.evaluate.generate import generate_answers
from sft_core.evaluate.tasks import TOKENS_A_FORWARD, row_losses

PAD, VOCABULARY = 0, 50


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,  # the least that vLLM has on a CPU
        initializer_range=0.5,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, VOCABULARY, length).astype(np.int32) for length in (3, 17, 1, 9, 9, 30, 2)]


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: np.ndarray, num_tokens: int) -> list[int]:
    """One prompt, no padding, no cache."""
    ids = prompt.tolist()
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def one_by_one(model: PreTrainedModel, prompts: list[np.ndarray]) -> list[list[int]]:
    """Greedy answers of 8 tokens, without a batch."""
    answers = [greedy(model, prompt, 8) for prompt in prompts]
    assert len({tuple(ids) for ids in answers}) > 4, "prompts that all give the same answer show nothing"
    return answers


@pytest.fixture
def batches(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shape, prompts and tokens, of each batch that the model is given."""
    found: list[tuple[int, int]] = []
    generate = model.generate

    def noted(**arguments: Any) -> Any:
        found.append(tuple(arguments["input_ids"].shape))
        return generate(**arguments)

    monkeypatch.setattr(model, "generate", noted)
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_generate_batched_is_greedy_one_by_one(
    model: PreTrainedModel, prompts: list[np.ndarray], one_by_one: list[list[int]], batch_size: int
) -> None:
    found = generate_answers(model, prompts, stop_ids=[49], pad_id=PAD, max_new_tokens=8, batch_size=batch_size)
    expected = [ids[: ids.index(49) + 1] if 49 in ids else ids for ids in one_by_one]
    assert [ids.tolist() for ids in found] == expected


@pytest.mark.parametrize(
    ("room", "batch_size", "shapes"),
    [
        (10, None, [(1, length) for length in (30, 17, 9, 9, 3, 2, 1)]),  # less than a prompt takes
        (51, None, [(1, 30), (2, 17), (3, 9), (1, 1)]),
        (51, 2, [(1, 30), (2, 17), (2, 9), (2, 2)]),
        (10_000, None, [(7, 30)]),
    ],
)
def test_generate_batches_by_tokens_give_the_answers_one_by_one(
    model: PreTrainedModel,
    prompts: list[np.ndarray],
    one_by_one: list[list[int]],
    batches: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    room: int,
    batch_size: int | None,
    shapes: list[tuple[int, int]],
) -> None:
    monkeypatch.setattr(generate, "TOKENS_ON_A_CPU", room)
    found = generate_answers(model, prompts, stop_ids=[], pad_id=PAD, max_new_tokens=8, batch_size=batch_size)
    assert [ids.tolist() for ids in found] == one_by_one
    assert batches == shapes


def test_generate_without_memory_goes_on_with_half_the_prompts(
    model: PreTrainedModel,
    prompts: list[np.ndarray],
    one_by_one: list[list[int]],
    batches: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    forward = model.forward
    room = 80

    def limited(input_ids: torch.Tensor, **more: Any) -> Any:
        if more["attention_mask"].numel() > room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(input_ids, **more)

    monkeypatch.setattr(model, "forward", limited)
    found = generate_answers(model, prompts, stop_ids=[], pad_id=PAD, max_new_tokens=8)
    assert [ids.tolist() for ids in found] == one_by_one
    assert [rows for rows, _ in batches] == [7, 3, 1, 1, 2, 3], "three prompts of 30 tokens have too many, too"
    assert [record.args for record in caplog.records] == [(7, 3), (3, 1)]
    room = 30
    with pytest.raises(torch.cuda.OutOfMemoryError, match=r"one prompt of 30 tokens and 8 new ones do not fit"):
        generate_answers(model, prompts, stop_ids=[], pad_id=PAD, max_new_tokens=8)


@pytest.mark.parametrize("trained_with", ["eager", "flex_attention"])
def test_generate_reads_its_cache_with_sdpa_and_leaves_the_model_as_it_was(
    model: PreTrainedModel,
    prompts: list[np.ndarray],
    one_by_one: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    trained_with: str,
) -> None:
    served, forward = set(), model.forward

    def noted(*inputs: Any, **more: Any) -> Any:
        served.add(model.config._attn_implementation)
        return forward(*inputs, **more)

    monkeypatch.setattr(model, "forward", noted)
    before = model.config._attn_implementation
    model.set_attn_implementation(trained_with)
    try:
        found = generate_answers(model, prompts, stop_ids=[], pad_id=PAD, max_new_tokens=8)
        assert [ids.tolist() for ids in found] == one_by_one
        assert served == {"sdpa"} and model.config._attn_implementation == trained_with
        with pytest.raises(KeyError), generate.as_served(model):
            raise KeyError
        assert model.config._attn_implementation == trained_with
        monkeypatch.setattr(type(model), "_supports_sdpa", False)
        served.clear()
        generate_answers(model, prompts[:1], stop_ids=[], pad_id=PAD, max_new_tokens=1)
        assert served == {"eager"}, "of a class without it"
    finally:
        monkeypatch.undo()
        model.set_attn_implementation(before)


def test_room_of_a_token_is_that_of_the_models_cache(model: PreTrainedModel, prompts: list[np.ndarray]) -> None:
    cache = model(torch.from_numpy(prompts[1].astype(np.int64))[None], use_cache=True).past_key_values
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    computed = (8 * 32 + 3 * 48) * 4  # of one layer, in float32
    assert generate.bytes_of_a_token(model) == held / len(prompts[1]) + computed


def test_generate_passes_over_the_models_own_settings(model: PreTrainedModel, prompts: list[np.ndarray]) -> None:
    settings = {"stop_ids": [49], "pad_id": PAD, "max_new_tokens": 8, "batch_size": 3}
    expected = generate_answers(model, prompts, **settings)
    own = model.generation_config
    model.generation_config = GenerationConfig(repetition_penalty=1e6, no_repeat_ngram_size=1, do_sample=True)
    try:
        found = generate_answers(model, prompts, **settings)
        assert model.generation_config.no_repeat_ngram_size == 1, "and leaves them"
    finally:
        model.generation_config = own
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected]


@pytest.mark.parametrize("padded_with_stop", [False, True])
def test_generate_stop_token_ends_the_answer_and_is_kept(
    model: PreTrainedModel, prompts: list[np.ndarray], padded_with_stop: bool
) -> None:
    full = [greedy(model, prompt, 8) for prompt in prompts]
    stops = sorted({full[0][2], full[1][4]})
    pad_id = stops[0] if padded_with_stop else PAD  # a vocabulary without a padding token pads with its end token
    found = generate_answers(model, prompts, stop_ids=stops, pad_id=pad_id, max_new_tokens=8, batch_size=4)
    ended = 0
    for ids, whole in zip(found, full, strict=True):
        places = [place for place, token in enumerate(whole) if token in stops]
        assert ids.tolist() == (whole[: places[0] + 1] if places else whole)
        ended += bool(places)
    assert 1 <= ended < len(prompts)


def test_generate_no_prompts_is_nothing(model: PreTrainedModel) -> None:
    assert generate_answers(model, [], stop_ids=[1], pad_id=PAD, max_new_tokens=8, batch_size=4) == []


def test_row_losses_grouped_are_those_of_each_row(model: PreTrainedModel) -> None:
    rng = np.random.default_rng(0)
    lengths = [700, 900, 500, 5, 2, TOKENS_A_FORWARD + 100, 3, 1, 400]
    rows = [
        TokenRow(rng.integers(1, VOCABULARY, n).astype(np.int32), rng.integers(0, 2, n).astype(np.uint8))
        for n in lengths
    ]
    found, num_correct = row_losses(model, rows)
    assert found.shape == num_correct.shape == (len(rows),)
    assert 0 < num_correct.sum() < sum(int(row.trained[1:].sum()) for row in rows)
    with torch.no_grad():
        for row, total, correct in zip(rows, found, num_correct, strict=True):
            ids = torch.from_numpy(row.input_ids.astype(np.int64))
            logits = model(ids[None], use_cache=False).logits[0, :-1]
            likeliest = (logits.argmax(dim=-1) == ids[1:]).numpy()
            assert correct == (likeliest & (row.trained[1:] == 1)).sum()
            nll = F.cross_entropy(logits, ids[1:], reduction="none")[torch.from_numpy(row.trained[1:]) == 1]
            assert total == pytest.approx(nll.sum().item(), rel=1e-4, abs=1e-6)
    assert [values.tolist() for values in row_losses(model, [])] == [[], []]
