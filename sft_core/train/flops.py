"""FLOPs of training: per token, per pair of tokens in attention, per trained token."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import numpy as np

Amount = TypeVar("Amount", float, np.ndarray)

# Layers whose attention sees the whole document, by the names of transformers' configs.
FULL_ATTENTION = ("full_attention", "hybrid")
# How many experts a token uses, by the names of transformers' configs.
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")


@dataclasses.dataclass(frozen=True)
class Flops:
    """Forward and backward; a forward pass is a third.

    Six operations a parameter and token that it is multiplied with (PaLM, arXiv 2204.02311, appendix B): the layers'
    parameters with each token, those of the head with trained tokens alone, for no other logits are made.
    """

    token: float  # without the embedding, which is looked up; of the experts only those that a token uses
    pair: float
    trained_token: float  # the head

    def of(self, num_tokens: Amount, squares: Amount, num_trained: Amount) -> Amount:
        """squares: the sum of the documents' squared lengths, for attention sees a document and not its pack."""
        return self.token * num_tokens + self.pair * squares + self.trained_token * num_trained

    def of_documents(self, num_tokens: np.ndarray, num_trained: np.ndarray) -> np.ndarray:
        """Of each document: float64, shape (documents,)."""
        lengths = num_tokens.astype(np.float64)
        return self.of(lengths, lengths**2, num_trained.astype(np.float64))


def training_flops(model: Any) -> Flops:
    """model: of transformers, with or without its weights."""
    from torch import nn

    head = model.get_output_embeddings()
    apart = [module for module in model.modules() if isinstance(module, nn.Embedding)] + ([head] if head else [])
    is_counted = {id(parameter) for module in apart for parameter in module.parameters()}
    shares, of_token = _expert_shares(model), 0.0
    for parameter in model.parameters():
        if id(parameter) not in is_counted:
            of_token += parameter.numel() * shares.get(id(parameter), 1.0)
    of_head = head.weight.numel() if head is not None else 0
    return Flops(6.0 * of_token, pair_flops(model.config), 6.0 * of_head)


def _expert_shares(model: Any) -> dict[int, float]:
    """The share of tokens that each expert's parameter is multiplied with, by the parameter's id.

    Experts are stacked in one parameter of shape (experts, ..., ...) or are a list of modules named `experts`.
    """
    from torch import nn

    config = model.config.get_text_config()
    top_k = next((getattr(config, name) for name in TOP_K if getattr(config, name, None)), None)
    if top_k is None:
        return {}
    shares = {}
    for name, module in model.named_modules():
        is_list = isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "experts"
        num_experts = len(module) if is_list else getattr(module, "num_experts", 0)
        for parameter in module.parameters(recurse=is_list) if num_experts else ():
            if is_list or (parameter.ndim == 3 and len(parameter) == num_experts):
                shares[id(parameter)] = float(np.mean(top_k)) / num_experts
    return shares


def pair_flops(config: Any) -> float:
    """6 * layers * attention width: the FLOPs of attention in a document of L tokens, divided by L squared.

    PaLM (arXiv 2204.02311, appendix B) counts 12 * layers * heads * head size * T a token at sequence length T, as
    nanoGPT does, over the whole T x T square; half of the 12 is here, for causal attention needs only the triangle,
    and kernels that skip the rest do only that.

    Layers are those that see the whole document: sliding windows and recurrent layers are linear, and their small
    attention terms are left out, as is all attention of a model whose config names no heads (Mamba).
    """
    config = config.get_text_config()
    num_heads, hidden_size, layers = (
        getattr(config, name, None) for name in ("num_attention_heads", "hidden_size", "num_hidden_layers")
    )
    if not (isinstance(num_heads, int) and isinstance(hidden_size, int) and isinstance(layers, int) and num_heads):
        return 0.0
    kinds = getattr(config, "layer_types", None)
    num_full = layers if kinds is None else sum(kind in FULL_ATTENTION for kind in kinds)
    width = num_heads * (getattr(config, "head_dim", None) or hidden_size // num_heads)
    return 6.0 * num_full * width
