"""Greedy answers to token prompts, batched by length."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig


@torch.inference_mode()
def generate_answers(
    model: Any, prompts: list[np.ndarray], *, stop_ids: list[int], pad_id: int, max_new_tokens: int, batch_size: int
) -> list[np.ndarray]:
    """New tokens of each prompt, int64, up to and with the stop token; at most `max_new_tokens`, then cut off.

    prompts: int32, shape (tokens,) each. Prompts of like length share a batch, padded on the left.
    """
    # Its own settings, not the model's: a repetition penalty would make a copied word a wrong answer.
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop_ids, pad_token_id=pad_id, use_cache=True
    )
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
        )
        for row, index in enumerate(indices):
            answers[index] = _until_stop(generated[row, length:].cpu().numpy(), stop_ids)
    return answers


def _until_stop(ids: np.ndarray, stop_ids: list[int]) -> np.ndarray:
    stops = np.flatnonzero(np.isin(ids, stop_ids))
    return ids[: stops[0] + 1] if len(stops) else ids
