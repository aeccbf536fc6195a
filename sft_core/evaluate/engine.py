"""The interface of engines, which answer prompts: transformers (generate.py) or vLLM (with_vllm.py)."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from sft_core.recipe.evaluation import Sampling


@dataclasses.dataclass(frozen=True)
class Request:
    """Prompts, and how to answer them."""

    prompts: list[np.ndarray]  # int32, shape (tokens,) each
    stop_ids: list[int]  # an answer ends at the first of them
    max_new_tokens: int
    sampling: Sampling | None = None  # None: the likeliest token each time
    draw_keys: list[int] = dataclasses.field(default_factory=list)  # a prompt's draws depend on the seed and its key

    @property
    def num_samples(self) -> int:
        return 1 if self.sampling is None else self.sampling.num_samples


class Engine(Protocol):
    @property
    def name(self) -> str:
        """The engine and its version."""

    def write(self, request: Request) -> list[np.ndarray]:
        """The new tokens of each prompt's samples, prompt after prompt: int64, up to and with the stop token."""
