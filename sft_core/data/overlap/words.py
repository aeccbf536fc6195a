"""Conversations as words and n-grams of words, for comparing rows.

Invariant: no n-gram crosses two turns, and a turn of fewer than n words is one n-gram, of its own length.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from typing import Any, NamedTuple

import numpy as np
import xxhash

from sft_core.data.sources.formats.canonical import Conversation, Text

# Scripts that put no spaces between words (Han, kana, Thai, Lao, Burmese, Khmer): each character is a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_WORD_OR_SYMBOL = re.compile(rf"{_WORD.pattern}|[^\w\s]")
_BASE = 0x9E3779B97F4A7C15  # odd, so that its powers lose no bits

# The sides of a row, each compared by itself. SETTINGS: how the row is rendered and trained.
CONTEXT, PROMPT, ANSWER, SETTINGS = range(4)
SIDES = {
    "settings": SETTINGS,
    "tools": CONTEXT,
    "system": CONTEXT,
    "user": PROMPT,
    "tool": PROMPT,
    "reasoning": ANSWER,
    "assistant": ANSWER,
    "tool_calls": ANSWER,
    "text": ANSWER,
}


class Turn(NamedTuple):
    """A piece of a conversation. role: a key of SIDES."""

    role: str
    text: str


def turns(conversation: Conversation) -> list[Turn]:
    """Everything in a conversation that shapes its training rows, in order: all but the `answer` for scoring."""
    if "text" in conversation:
        return [Turn("text", conversation["text"])]
    messages = conversation["messages"]
    choices = [
        [index, m.get("train"), m.get("weight")] for index, m in enumerate(messages) if {"train", "weight"} & {*m}
    ]
    pieces = []
    if conversation.get("kwargs") or choices:
        pieces.append(Turn("settings", _json([conversation.get("kwargs", {}), choices])))
    if conversation.get("tools"):
        pieces.append(Turn("tools", _json(conversation["tools"])))
    for message in messages:
        if message.get("reasoning_content"):
            pieces.append(Turn("reasoning", message["reasoning_content"]))
        if text := _text(message["content"]):
            pieces.append(Turn(message["role"], text))
        if message.get("tool_calls"):
            pieces.append(Turn("tool_calls", _json([call["function"] for call in message["tool_calls"]])))
    return pieces


def exact_digest(of: list[Turn]) -> int:
    """A 64-bit digest of the turns that ignores white space and Unicode form (NFC), but not case."""
    normalised = [[turn.role, " ".join(_nfc(turn.text).split())] for turn in of]
    return int.from_bytes(hashlib.sha256(_json(normalised).encode()).digest()[:8], "big")


def words(text: str) -> list[str]:
    """Words and symbols with their case: in code, arithmetic and puzzles about letters both carry the meaning."""
    return _WORD_OR_SYMBOL.findall(_nfc(text))


def folded_words(text: str) -> list[str]:
    """Words without case, punctuation and Unicode variants (NFKC), to find a text however it is typed."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


class HashedTurns(NamedTuple):
    """The words of consecutive turns, 64 bits a word: the same in every process."""

    words: np.ndarray  # uint64, shape (words,)
    lengths: np.ndarray  # int64, shape (turns,): words of each turn


def hash_turns(of: list[list[str]]) -> HashedTurns:
    """of: the words of each turn."""
    lengths = np.fromiter(map(len, of), np.int64, len(of))
    hashes = (xxhash.xxh3_64_intdigest(word.encode()) for turn in of for word in turn)
    return HashedTurns(np.fromiter(hashes, np.uint64, int(lengths.sum())), lengths)


class Grams(NamedTuple):
    """N-grams of consecutive turns, in order."""

    hashes: np.ndarray  # uint64, shape (n-grams,)
    starts: np.ndarray  # int64, shape (n-grams,): the place of the first word among all words


def ngrams(turns: HashedTurns, n: int) -> Grams:
    """The n-grams of each turn.

    Equal words give equal hashes whatever n was, so a short turn's one n-gram is found inside longer texts.
    """
    ends = np.repeat(np.cumsum(turns.lengths), turns.lengths)
    place = np.arange(len(turns.words))
    begins_turn = place == ends - np.repeat(turns.lengths, turns.lengths)
    starts = np.flatnonzero((place + n <= ends) | begins_turn)
    hashes = np.zeros(len(starts), np.uint64)
    power = 1
    for offset in range(n):
        within = np.flatnonzero(starts + offset < ends[starts])
        hashes[within] += turns.words[starts[within] + offset] * np.uint64(power)
        power = power * _BASE % 2**64
    return Grams(_mixed(hashes), starts)


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """Every bit of the sums spread over all 64 (the finalizer of MurmurHash3, Appleby 2011)."""
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(multiplier)
    return hashes ^ (hashes >> np.uint64(33))


def _nfc(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _text(content: Text) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def excerpt(of: list[Turn], max_characters: int = 300) -> str:
    """The first turns for a reader, each cut to its share."""
    shown = [turn for turn in of if turn.role not in ("settings", "tools")][:3]
    room = max_characters // max(1, len(shown))
    return " | ".join(f"{t.role}: {t.text if len(t.text) <= room else t.text[: room - 2] + ' …'}" for t in shown)
