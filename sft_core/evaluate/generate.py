"""Answers to token prompts by transformers, greedy or drawn, batched by length."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
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

from sft_core.evaluate.engine import Request

log = logging.getLogger(__name__)
TOKENS_ON_A_CPU = 16_384
SHARE_OF_MEMORY = 0.4  # of the free memory: a cache that grows by a token at a time leaves gaps
BYTES_A_LOGIT = 24  # the likeliest token is searched in float32, a token is drawn in float64
# B is the rows of a batch, T their tokens, V the vocabulary.


@dataclasses.dataclass(frozen=True)
class WithTransformers:
    """The engine (engine.py) that answers by a model in this process."""

    model: Any
    pad_id: int
    batch_size: int | None  # prompts that are answered together, at most

    @property
    def name(self) -> str:
        return f"transformers {transformers.__version__}"

    def write(self, request: Request) -> list[np.ndarray]:
        drawn, sampling = None, request.sampling
        if sampling is not None:
            numbers = uniforms(sampling.seed, request.draw_keys, sampling.num_samples, request.max_new_tokens)
            drawn = Drawn(numbers, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
        return generate_answers(
            self.model,
            [prompt for prompt in request.prompts for _ in range(request.num_samples)],
            stop_ids=request.stop_ids,
            pad_id=self.pad_id,
            max_new_tokens=request.max_new_tokens,
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
    batch_size: int | None = None,
    drawn: Drawn | None = None,
) -> list[np.ndarray]:
    """New tokens of each prompt, int64, up to and with the stop token; at most `max_new_tokens`, then cut off.

    prompts: int32, shape (tokens,) each. Prompts of like length share a batch, padded on the left: as many as the
    device has room for, `batch_size` at most. drawn: None for the likeliest token each time.
    """
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop_ids, pad_token_id=pad_id, use_cache=True
    )
    answers: list[np.ndarray] = [np.empty(0, np.int64)] * len(prompts)
    waiting = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    room, tokens_of_a_row = room_for(model)
    with as_served(model), tqdm(total=len(prompts), unit=" prompts", disable=None, desc="generate") as progress:
        model.generation_config = GenerationConfig()
        while waiting:
            tokens_a_row = len(prompts[waiting[0]]) + max_new_tokens + tokens_of_a_row
            size = min(max(1, room // tokens_a_row), batch_size or len(waiting), len(waiting))
            indices = waiting[:size]
            generated = _generated(model, [prompts[index] for index in indices], settings, pad_id, drawn, indices)
            if generated is None:
                if size == 1:
                    raise torch.cuda.OutOfMemoryError(
                        f"one prompt of {len(prompts[indices[0]])} tokens and {max_new_tokens} new ones do not fit the "
                        "GPU; lower evaluation.max_new_tokens or packing.max_length"
                    )
                room = size // 2 * tokens_a_row
                torch.cuda.empty_cache()
                log.warning("out_of_memory=%d prompts at once; now %d at once", size, size // 2)
                continue
            for index, ids in zip(indices, generated, strict=True):
                answers[index] = _until_stop(ids, stop_ids)
            waiting = waiting[size:]
            progress.update(size)
    return answers


def _generated(
    model: Any,
    prompts: list[np.ndarray],
    settings: GenerationConfig,
    pad_id: int,
    drawn: Drawn | None,
    numbers: list[int],
) -> np.ndarray | None:
    """New tokens of a batch, the longest prompt first: int64, shape (prompts, tokens). None: out of memory."""
    length = len(prompts[0])
    ids_BT = torch.full((len(prompts), length), pad_id, dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, length - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask_BT[row, length - len(prompt) :] = 1
    try:
        generated_BT = model.generate(
            input_ids=ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            generation_config=settings,
            logits_processor=drawn.processors(numbers, length) if drawn else None,
        )
    except torch.cuda.OutOfMemoryError:
        return None  # drop the error before the next try: it refers to the tensors that fill the memory
    return generated_BT[:, length:].cpu().numpy()


@contextlib.contextmanager
def as_served(model: Any) -> Iterator[None]:
    """The model with attention that reads a cache. At the end its own attention and generation config are restored.

    Replace the generation config inside: `generate` fills what a given config leaves open from the model's
    (transformers 5.23), and a repetition penalty there would make a copied word a wrong answer.
    """
    settings, attention = model.generation_config, model.config._attn_implementation
    served = "sdpa" if model._supports_sdpa else "eager"
    is_other = attention != served and model._can_set_attn_implementation()
    try:
        if is_other:
            model.set_attn_implementation(served)
        yield
    finally:
        model.generation_config = settings
        if is_other:
            model.set_attn_implementation(attention)


def room_for(model: Any) -> tuple[int, int]:
    """(room, tokens of a row's logits): how many tokens of prompts and answers fit the device at once.

    The second number says how many tokens' memory the logits of a row take.
    """
    if model.device.type != "cuda":
        return TOKENS_ON_A_CPU, 0
    free, _ = torch.cuda.mem_get_info(model.device)
    unused = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    token_bytes = bytes_of_a_token(model)
    logit_bytes = BYTES_A_LOGIT * model.config.get_text_config().vocab_size
    return int(SHARE_OF_MEMORY * (free + unused)) // token_bytes, -(-logit_bytes // token_bytes)


def bytes_of_a_token(model: Any) -> int:
    """Bytes of a token in the cache of all layers and in the activations of a layer."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    cached = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    computed = 8 * config.hidden_size + 3 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    return (cached + computed) * model.dtype.itemsize


def _until_stop(ids: np.ndarray, stop_ids: list[int]) -> np.ndarray:
    stops = np.flatnonzero(np.isin(ids, stop_ids))
    return ids[: stops[0] + 1] if len(stops) else ids


class Drawn:
    """Draws tokens from the model's distribution with random numbers that are fixed beforehand for each prompt.

    transformers draws a batch's tokens with one generator, so a row's tokens depend on the rows beside it. Here they
    depend on the row's numbers and its logits alone; logits are the same in any batch, up to rounding.
    """

    def __init__(self, uniforms: np.ndarray, *, temperature: float, top_p: float, top_k: int | None):
        """uniforms: float64 in [0, 1), shape (prompts, new tokens)."""
        self._uniforms = uniforms
        self._shape: list[LogitsProcessor] = [TemperatureLogitsWarper(temperature)]
        self._shape += [TopKLogitsWarper(top_k)] if top_k is not None else []
        self._shape += [TopPLogitsWarper(top_p)] if top_p < 1 else []

    def processors(self, prompts: list[int], length: int) -> LogitsProcessorList:
        """The processors for a batch. prompts: their numbers; each is padded to `length` tokens."""
        return LogitsProcessorList([*self._shape, _Pick(self._uniforms[prompts], length)])


class _Pick(LogitsProcessor):
    """Picks a token by inversion: the first at which the cumulative probability exceeds the row's number."""

    def __init__(self, uniforms_BT: np.ndarray, length: int):
        self._uniforms_BT = torch.from_numpy(uniforms_BT)
        self._length = length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        cumulative_BV = torch.softmax(scores.double(), dim=-1).cumsum(dim=-1)
        drawn_B = self._uniforms_BT[:, input_ids.shape[1] - self._length].to(scores.device)
        # Scale by the last sum, which rounding leaves a little off 1: otherwise a number could be past the end.
        target_B1 = (drawn_B * cumulative_BV[:, -1])[:, None]
        picked_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, picked_B1, 0.0)  # type: ignore[return-value]


def uniforms(seed: int, row_keys: list[int], num_samples: int, num_tokens: int) -> np.ndarray:
    """Random numbers to draw with: float64 in [0, 1), shape (rows * samples, tokens), a row's samples in sequence.

    A sample's numbers depend on the seed, the row's key and the sample's place, not on other rows or the number of
    samples.
    """
    streams = [np.random.default_rng([seed, key, sample]) for key in row_keys for sample in range(num_samples)]
    return np.array([stream.random(num_tokens) for stream in streams]).reshape(len(streams), num_tokens)
