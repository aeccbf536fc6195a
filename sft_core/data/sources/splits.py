"""Train, selection and report split: a hash of the prompt alone chooses a row's split.

So a row, its duplicates and its think twin share a split, in whatever sources they stand, and no change of the mixture
moves a row.
"""

from __future__ import annotations

import hashlib
import unicodedata

import numpy as np

from sft_core.data.sources.formats.canonical import Conversation, Text

TRAIN, SELECTION, REPORT = 0, 1, 2
NAMES = ("train", "selection", "report")
_MODE_FLAGS = frozenset({"/think", "/no_think"})


def prompt_hash(conversation: Conversation) -> int:
    """64 bits of SHA-256 over the normalised system and user turns (the text itself for a raw-text row).

    Normalised: Unicode NFKC, case folded, white space collapsed, thinking flags removed.
    """
    if "text" in conversation:
        prompt = [_normalise(conversation["text"])]
    else:
        turns = (m for m in conversation["messages"] if m["role"] in ("system", "user"))
        prompt = [f"{m['role']}\0{words}" for m in turns if (words := _normalise(_text(m["content"])))]
    return int.from_bytes(hashlib.sha256("\0".join(prompt).encode()).digest()[:8], "big")


def assign(prompt_hashes: np.ndarray, *, selection_share: float, report_share: float) -> np.ndarray:
    """The split of each row: uint8 of TRAIN, SELECTION or REPORT. prompt_hashes: uint64, shape (rows,)."""
    position = prompt_hashes.astype(np.float64) / 2.0**64
    split = np.full(len(prompt_hashes), TRAIN, dtype=np.uint8)
    split[position < report_share + selection_share] = SELECTION
    split[position < report_share] = REPORT
    return split


def _normalise(text: str) -> str:
    words = unicodedata.normalize("NFKC", text).casefold().split()
    return " ".join(word for word in words if word not in _MODE_FLAGS)


def _text(content: Text) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""
