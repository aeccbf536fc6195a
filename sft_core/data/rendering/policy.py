"""The recipe's choice of what to train of a conversation."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class RowPolicy:
    """training.loss_scope, and the choices of the same names in chat_template."""

    loss_scope: str = "assistant"  # every assistant turn; completion: the last one; all: every token
    thinking: str = "keep"  # see sft_core/data/rendering/thinking.py
    empty_thinking: str = "as_served"  # or trained, masked
    served_prefix: str = "tokens"  # turns share a row if the served prompt has the row's tokens; text: its characters
