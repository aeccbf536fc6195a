"""Drawn answers follow the model's distribution, and are the row's own: batches and order change none of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from sft_core.evaluate.generate import Drawn, generate_answers, uniforms
from tests.evaluate.test_generate import PAD, VOCABULARY, greedy, model, prompts

__all__ = ["model", "prompts"]  # fixtures
NUM_TOKENS = 8


def drawn(numbers: np.ndarray, temperature: float = 1.0, top_p: float = 1.0, top_k: int | None = None) -> Drawn:
    return Drawn(numbers, temperature=temperature, top_p=top_p, top_k=top_k)


def sampled(
    model: PreTrainedModel, prompts: list[np.ndarray], numbers: np.ndarray, batch_size: int = 4, **settings: float
) -> list[list[int]]:
    found = generate_answers(
        model,
        prompts,
        stop_ids=[49],
        pad_id=PAD,
        max_new_tokens=numbers.shape[1],
        batch_size=batch_size,
        drawn=drawn(numbers, **settings),  # type: ignore[arg-type]
    )
    return [ids.tolist() for ids in found]


def test_samples_are_the_same_in_any_batch_and_order(model: PreTrainedModel, prompts: list[np.ndarray]) -> None:
    keys = list(range(100, 100 + len(prompts)))
    numbers = uniforms(0, keys, 1, NUM_TOKENS)
    expected = sampled(model, prompts, numbers)
    assert expected != [greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
    for batch_size in (1, 2, 100):
        assert sampled(model, prompts, numbers, batch_size) == expected
    order = [3, 6, 0, 1, 5, 2, 4]
    turned = sampled(model, [prompts[n] for n in order], uniforms(0, [keys[n] for n in order], 1, NUM_TOKENS))
    assert turned == [expected[n] for n in order]
    assert sampled(model, prompts[2:4], uniforms(0, keys[2:4], 1, NUM_TOKENS)) == expected[2:4]
    assert sampled(model, prompts, uniforms(1, keys, 1, NUM_TOKENS)) != expected


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4), st.integers(1, 3))
def test_uniforms_are_those_of_seed_row_and_sample(seed: int, keys: list[int], num_samples: int) -> None:
    found = uniforms(seed, keys, num_samples, 3)
    assert found.shape == (len(keys) * num_samples, 3)
    assert (found >= 0).all() and (found < 1).all()
    for place, key in enumerate(keys):
        more = uniforms(seed, [key], num_samples + 1, 5)
        assert (found[place * num_samples : (place + 1) * num_samples] == more[:-1, :3]).all()
        assert len({tuple(row) for row in more.tolist()}) == num_samples + 1


@torch.no_grad()
def probabilities(model: PreTrainedModel, prompt: np.ndarray, temperature: float) -> np.ndarray:
    logits = model(torch.from_numpy(prompt.astype(np.int64))[None], use_cache=False).logits[0, -1]
    return torch.softmax(logits.double() / temperature, dim=-1).numpy()


@pytest.mark.parametrize("settings", [{"temperature": 2.5}, {"temperature": 4.0, "top_k": 6}, {"top_p": 0.6}])
def test_samples_follow_the_shaped_distribution(
    model: PreTrainedModel, prompts: list[np.ndarray], settings: dict[str, float]
) -> None:
    count, prompt = 4000, prompts[3]
    found = sampled(model, [prompt] * count, uniforms(0, [5], count, 1), batch_size=1000, **settings)
    shares = np.bincount([ids[0] for ids in found], minlength=VOCABULARY) / count
    expected = probabilities(model, prompt, settings.get("temperature", 1.0))
    order = np.argsort(-expected)
    kept = np.zeros(VOCABULARY, bool)
    num_kept = int(settings.get("top_k", VOCABULARY))
    if "top_p" in settings:  # the fewest likeliest that reach it
        num_kept = int((np.cumsum(expected[order]) < settings["top_p"]).sum()) + 1
    kept[order[:num_kept]] = True
    assert num_kept == VOCABULARY or 1 < num_kept < VOCABULARY
    expected = np.where(kept, expected, 0) / expected[kept].sum()
    assert (shares[~kept] == 0).all()
    errors = np.sqrt(expected * (1 - expected) / count) + 1e-9
    assert (np.abs(shares - expected) < 4.5 * errors + 1e-6).all()


def test_sample_of_a_number_next_to_one_is_a_possible_token(model: PreTrainedModel, prompts: list[np.ndarray]) -> None:
    numbers = np.array([[0.0], [np.nextafter(1.0, 0.0)]])
    for ids in sampled(model, [prompts[3]] * 2, numbers, top_k=3):
        assert probabilities(model, prompts[3], 1.0)[ids[0]] >= np.sort(probabilities(model, prompts[3], 1.0))[-3]
