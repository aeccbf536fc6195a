"""Checkpoints that write what they are made to: each token follows one other, so answers hang on a prompt's end."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

TOKENIZER = Path(__file__).resolve().parents[2] / "configs" / "quickstart" / "tokenizer"
TEMPLATES = Path(__file__).resolve().parents[2] / "configs" / "templates"
THINK, NO_THINK = "assistant\n", "assistant\n<think>\n\n</think>\n\n"  # each is one token of the quickstart's tokenizer
SMILE = "Hi \U0001f642,é!"  # the smile takes four tokens, é two


def load_tokenizer(template: str | None = "thinking") -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    if template is not None:
        tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    return tokenizer


def chained(folder: Path, answers: dict[str, str], *, endless: bool = False, context: int = 512) -> Path:
    """Saves a Llama that answers with answers[THINK] or answers[NO_THINK], and then stops; `endless`: starts over.

    No token stands twice in the answers: what follows a token is one token. The second stop token, which the
    generation config alone knows, is `~`.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer()
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size + 1,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, size + 1))
        model.lm_head.weight.zero_()
        for prompt_end, text in answers.items():
            (start,) = tokenizer(prompt_end)["input_ids"]
            ids = tokenizer(text)["input_ids"]
            chain = [start, *ids, ids[0] if endless else tokenizer.eos_token_id]
            assert len({start, *ids}) == len(ids) + 1, "each token has one successor"
            for token, following in itertools.pairwise(chain):
                model.lm_head.weight[following, token] = 1.0
    (other_stop,) = tokenizer("~")["input_ids"]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, other_stop]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
