"""PEFT's settings of a LoRA training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import LoraConfig

    from sft_core.recipe.sections import Lora


def lora_config(lora: Lora | None, model: Any, added: list[str], tokenizer: Any) -> LoraConfig | None:
    """PEFT's LoRA settings. The embeddings of added tokens are trained fully: LoRA would leave them random."""
    if lora is None:
        return None
    from peft import LoraConfig

    token_indices: dict[str, list[int]] | None = None
    whole_modules: list[str] | None = None
    if added:
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
        embedding, head = (names[id(m)] for m in (model.get_input_embeddings(), model.get_output_embeddings()))
        if tied:
            token_indices = {embedding: tokenizer.convert_tokens_to_ids(added)}
        else:
            whole_modules = [embedding, head]
    target = lora.target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=target if isinstance(target, str) else list(target),
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        trainable_token_indices=token_indices,
        modules_to_save=whole_modules,
    )
