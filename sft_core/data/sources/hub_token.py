"""The hub's token comes from the environment (HF_TOKEN) and goes to the hub alone: into no recipe, log or output."""

from __future__ import annotations

import re


def check_token() -> None:
    """Raises ValueError for a token that no HTTP header can hold, before the client's message shows the token."""
    from huggingface_hub import get_token

    token = get_token()
    if token and not re.fullmatch(r"[!-~]+", token):
        raise ValueError("HF_TOKEN: it holds a character that no token has (white space, or not ASCII); set it again")
