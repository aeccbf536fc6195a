"""The model that is scored, on its device."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sft_core.train.loss import Forward


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
    network, vocabulary = load_model(**model, tokenizer=tokenizer, seed=seed, half=bf16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # In bfloat16 throughout, as it is served: autocast would convert every weight again for each new token.
    return network.to(device=device, dtype=torch.bfloat16 if bf16 else None).eval(), vocabulary


_TRIED: weakref.WeakKeyDictionary[Any, Forward] = weakref.WeakKeyDictionary()


def how_to_run(network: Any) -> Forward:
    """How rows are given to the model together, or that each gets a forward of its own: tried on it, once."""
    import torch

    from sft_core.train.probe import class_isolation, model_isolation

    if network not in _TRIED:
        half, device = network.dtype != torch.float32, network.device
        attention = network.config._attn_implementation
        of_class = class_isolation(
            network.config, attention=attention, trust_remote_code=True, half=half, device=device.type
        )
        exact = not half and device.type == "cpu"
        isolation = model_isolation(network, of_class, attention=attention, device=device, exact=exact)
        _TRIED[network] = isolation.forward
    return _TRIED[network]
