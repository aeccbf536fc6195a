"""The model that is scored, on its device."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_scored(
    trained: Path | None,
    model: dict[str, Any] | None,
    tokenizer: dict[str, Any],
    *,
    attn_implementation: str,
    bf16: bool,
    seed: int,
) -> tuple[Any, Any]:
    """The start model, or without one (None) the checkpoint in `trained`, ready to be asked, and its tokenizer."""
    import torch

    from sft_core.train.model import load_model

    if model is None:
        assert trained is not None
        folder = str(trained / "model")
        tokenizer = {**tokenizer, "path": folder, "revision": None, "add_special_tokens": []}
        model = {
            "path": folder,
            "revision": None,
            "config": None,
            "dtype": "auto",
            "attn_implementation": attn_implementation,
            "stop_tokens": [],  # in the checkpoint's generation config
            "trust_remote_code": tokenizer["trust_remote_code"],
        }
    network: Any
    network, vocabulary = load_model(**model, tokenizer=tokenizer, seed=seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # In bfloat16 throughout, as it is served: autocast would convert every weight again for each new token.
    return network.to(device=device, dtype=torch.bfloat16 if bf16 else None).eval(), vocabulary
