"""Answers to token prompts, greedy or drawn, batched by length."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# B is the rows of a batch, T their tokens, V the vocabulary.


@dataclasses.dataclass(frozen=True)
class WithTransformers:
    """Greedy or drawn answers of a model that is loaded; see answers.Engine."""

    model: Any
    pad_id: int
    batch_size: int

    @property
    def name(self) -> str:
        return f"transformers {transformers.__version__}"

    def write(
        self,
        prompts: list[np.ndarray],
        keys: list[int],
        sampling: dict[str, Any] | None,
        *,
        stop_ids: list[int],
        max_new_tokens: int,
    ) -> list[np.ndarray]:
        drawn, num_samples = None, 1
        if sampling is not None:
            num_samples = sampling["num_samples"]
            numbers = uniforms(sampling["seed"], keys, num_samples, max_new_tokens)
            drawn = Drawn(numbers, **{name: sampling[name] for name in ("temperature", "top_p", "top_k")})
        return generate_answers(
            self.model,
            [prompt for prompt in prompts for _ in range(num_samples)],
            stop_ids=stop_ids,
            pad_id=self.pad_id,
            max_new_tokens=max_new_tokens,
            batch_size=self.batch_size,
            drawn=drawn,
        )


@torch.inference_mode()
def generate_answers(
    model: Any,
    prompts: list[np.ndarray],
    *,
    stop_ids: list[int],
    pad_id: int,
    max_new_tokens: int,
    batch_size: int,
    drawn: Drawn | None = None,
) -> list[np.ndarray]:
    """New tokens of each prompt, int64, up to and with the stop token; at most `max_new_tokens`, then cut off.

    prompts: int32, shape (tokens,) each. Prompts of like length share a batch, padded on the left. drawn: None for
    the likeliest token each time.
    """
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop_ids, pad_token_id=pad_id, use_cache=True
    )
    with _without_own_settings(model):
        return _in_batches(model, prompts, settings, stop_ids, pad_id, batch_size, drawn)


@contextlib.contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """generate fills what a given config leaves open from the model's own (transformers 5.23): a repetition penalty
    would make a copied word a wrong answer."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _in_batches(
    model: Any,
    prompts: list[np.ndarray],
    settings: GenerationConfig,
    stop_ids: list[int],
    pad_id: int,
    batch_size: int,
    drawn: Drawn | None,
) -> list[np.ndarray]:
    answers: list[np.ndarray] = [np.empty(0, np.int64)] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for start in tqdm(range(0, len(order), batch_size), unit=" batches", disable=None, desc="generate"):
        indices = order[start : start + batch_size]
        length = len(prompts[indices[0]])
        ids_BT = torch.full((len(indices), length), pad_id, dtype=torch.int64)
        mask_BT = torch.zeros_like(ids_BT)
        for row, index in enumerate(indices):
            prompt = torch.from_numpy(prompts[index].astype(np.int64))
            ids_BT[row, length - len(prompt) :] = prompt
            mask_BT[row, length - len(prompt) :] = 1
        generated = model.generate(
            input_ids=ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            generation_config=settings,
            logits_processor=drawn.processors(indices, length) if drawn else None,
        )
        for row, index in enumerate(indices):
            answers[index] = _until_stop(generated[row, length:].cpu().numpy(), stop_ids)
    return answers


def _until_stop(ids: np.ndarray, stop_ids: list[int]) -> np.ndarray:
    stops = np.flatnonzero(np.isin(ids, stop_ids))
    return ids[: stops[0] + 1] if len(stops) else ids


class Drawn:
    """Tokens drawn from the model's distribution by numbers that are fixed before: those of each prompt are its own.

    transformers draws a batch's tokens with one generator, so that a row's depend on what shares its batch. Here
    they depend on the row's numbers and its logits alone; these are the same in any batch, up to rounding.
    """

    def __init__(self, uniforms: np.ndarray, *, temperature: float, top_p: float, top_k: int | None):
        """uniforms: float64 in [0, 1), shape (prompts, new tokens)."""
        self._uniforms = uniforms
        self._shape: list[LogitsProcessor] = [TemperatureLogitsWarper(temperature)]
        self._shape += [TopKLogitsWarper(top_k)] if top_k is not None else []
        self._shape += [TopPLogitsWarper(top_p)] if top_p < 1 else []

    def processors(self, prompts: list[int], length: int) -> LogitsProcessorList:
        """For a batch of prompts, by their numbers, each padded to `length` tokens."""
        return LogitsProcessorList([*self._shape, _Pick(self._uniforms[prompts], length)])


class _Pick(LogitsProcessor):
    """Leaves one token, by inversion: the first at which the cumulative probability is over the row's number."""

    def __init__(self, uniforms_BT: np.ndarray, length: int):
        self._uniforms_BT = torch.from_numpy(uniforms_BT)
        self._length = length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        cumulative_BV = torch.softmax(scores.double(), dim=-1).cumsum(dim=-1)
        drawn_B = self._uniforms_BT[:, input_ids.shape[1] - self._length].to(scores.device)
        # Times the last sum, which rounding leaves a little off 1: no number is past the end.
        target_B1 = (drawn_B * cumulative_BV[:, -1])[:, None]
        picked_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, picked_B1, 0.0)  # type: ignore[return-value]


def uniforms(seed: int, row_keys: list[int], num_samples: int, num_tokens: int) -> np.ndarray:
    """Numbers to draw by: float64 in [0, 1), shape (rows * samples, tokens), a row's samples one after another.

    Each is the seed's, the row key's and the sample's own, whatever the other rows and the number of samples.
    """
    streams = [np.random.default_rng([seed, key, sample]) for key in row_keys for sample in range(num_samples)]
    return np.array([stream.random(num_tokens) for stream in streams]).reshape(len(streams), num_tokens)
