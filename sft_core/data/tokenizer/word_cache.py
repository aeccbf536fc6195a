"""A cache of the ids of words: texts are cut where their tokenizer cuts in any case, and each word is encoded once.

Byte-pair encoding merges within the parts that a pre-tokenizer makes. The pre-tokenizers listed here (of GPT-2, GPT-4,
Llama 3, Qwen, gpt-oss, DeepSeek and their kin) all end a part where a word ends (see word_ends). They look ahead only
for the last white space before other text, and find it as well where the text ends there.
Invariant: the ids equal the tokenizer's for the whole text. A tokenizer of another kind has no cache.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypedDict

import numpy as np

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

    from sft_core.data.tokenizer.word_table import WordTable

_MOST_KNOWN = 1 << 19  # words whose ids are kept
_MOST_BYTES = 1 << 24  # of those words; 50 MB with their ids and places
_CHARACTERS_AT_ONCE = 1 << 18

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WHITE_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_FIRST = r"[^\r\n\p{L}\p{N}]?"


def _by_case(contraction: str, digits: str) -> str:
    words = f"{_FIRST}{_UPPER}*{_LOWER}+{contraction}|{_FIRST}{_UPPER}+{_LOWER}*{contraction}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_WHITE_SPACE}"


GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Also of SmolLM3 and OLMo 2.
LLAMA_3 = rf"{_CONTRACTION}|{_FIRST}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_WHITE_SPACE}"
QWEN = rf"{_CONTRACTION}|{_FIRST}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_WHITE_SPACE}"
GPT_OSS = _by_case(f"{_CONTRACTION}?", r"\p{N}{1,3}")
MISTRAL = _by_case("", r"\p{N}")
DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"""
    + _WHITE_SPACE
)
PATTERNS = (GPT_2, LLAMA_3, QWEN, GPT_OSS, MISTRAL, DEEPSEEK)
# DeepSeek's has these before its last pattern: they separate digits and scripts of East Asia from the rest.
BEFORE = (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+")


class WordCache:
    """Encodes texts by `encode`, which it calls for each distinct word.

    encode: gives the int32 ids of each text, by a tokenizer for which `cuts_at_words` holds. added: its added tokens.
    """

    def __init__(self, encode: Callable[[list[str]], list[bytes]], added: Iterable[str]):
        self._encode = encode
        longest_first = sorted(added, key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        self._words: WordTable | None = None
        self._ids = np.empty(0, np.int32)  # of the words, one after another
        self._ends = np.empty(0, np.int64)  # shape (words,)

    def encode(self, texts: list[str]) -> list[bytes]:
        """Ids of each text, as int32."""
        encoded: list[bytes] = []
        first = num_characters = 0
        for number, text in enumerate(texts, 1):
            num_characters += len(text)
            if num_characters >= _CHARACTERS_AT_ONCE or number == len(texts):
                encoded += self._encode_some(texts[first:number])
                first, num_characters = number, 0
        return encoded

    def _encode_some(self, texts: list[str]) -> list[bytes]:
        from sft_core.data.tokenizer.word_table import WordTable, ends_of_words, gather

        parts = [self._added.split(text) if self._added else [text] for text in texts]
        data = [part.encode() for text_parts in parts for part in text_parts]
        part_ends = np.cumsum([len(part) for part in data])
        # A split by a group alternates between text and match.
        is_added = np.concatenate([np.arange(len(text_parts)) % 2 == 1 for text_parts in parts])
        text = np.frombuffer(b"".join(data), np.uint8)
        ends = ends_of_words(text, part_ends, is_added)
        if self._words is None or len(self._words) > _MOST_KNOWN or self._words.num_bytes > _MOST_BYTES:
            self._words, self._ids, self._ends = WordTable(), self._ids[:0], self._ends[:0]
        numbers = self._words.number(text, ends)
        self._learn(self._words.words(len(self._ends)))
        ids = gather(self._ids, self._ends, numbers)
        last_parts = np.cumsum(list(map(len, parts))) - 1
        num_words = np.searchsorted(ends, part_ends[last_parts], side="right")
        num_ids = np.concatenate([[0], np.cumsum(np.diff(self._ends, prepend=0)[numbers])])
        bounds = [0, *(ids.itemsize * num_ids[num_words]).tolist()]
        return [ids.data.cast("B")[start:end].tobytes() for start, end in itertools.pairwise(bounds)]

    def _learn(self, words: list[str]) -> None:
        encoded = self._encode(words)
        ends = len(self._ids) + np.cumsum([len(ids) for ids in encoded], dtype=np.int64) // self._ids.itemsize
        self._ids = np.concatenate([self._ids, np.frombuffer(b"".join(encoded), np.int32)])
        self._ends = np.concatenate([self._ends, ends])


def cuts_at_words(tokenizer: Tokenizer, added: Iterable[AddedToken]) -> bool:
    """Whether words can be encoded one by one by this tokenizer, which knows these added tokens."""
    from tokenizers import models

    state = settings(tokenizer)
    added = list(added)
    return (
        isinstance(tokenizer.model, models.BPE)
        and not tokenizer.model.dropout
        and (state["normalizer"] is None or state["normalizer"] == {"type": "NFC"})
        and _is_known(state["pre_tokenizer"] or {})
        # Such tokens are found before anything else, the longest first, whatever text is around them.
        and not any(token.lstrip or token.rstrip or token.single_word for token in added)
        and len({token.normalized for token in added}) <= 1
        and not (state["normalizer"] and any(token.normalized for token in added))
    )


class Component(TypedDict, total=False):
    """A normalizer, pre-tokenizer or decoder, as in the tokenizer's JSON. Types have further keys of their own."""

    type: str
    pretokenizers: list[Component]
    decoders: list[Component]


class Settings(TypedDict):
    normalizer: Component | None
    pre_tokenizer: Component | None
    decoder: Component | None


def settings(tokenizer: Tokenizer) -> Settings:
    """The settings around the tokenizer's model, as in its JSON."""
    from tokenizers import Tokenizer, models

    without_vocabulary = Tokenizer(models.BPE())  # a vocabulary takes a while to write and to read
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        setattr(without_vocabulary, part, getattr(tokenizer, part))
    loaded: Settings = json.loads(without_vocabulary.to_str())
    return loaded


def _is_known(pre_tokenizer: Component) -> bool:
    parts = pre_tokenizer["pretokenizers"] if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    match parts[-1]:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            patterns = [GPT_2]
        case {"type": "ByteLevel", "add_prefix_space": False}:
            patterns = []
        case _:
            return False
    for part in reversed(parts[:-1]):
        match part:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                patterns.append(pattern)
            case {"type": "Digits"}:
                patterns.append(BEFORE[0])
            case _:
                return False
    return bool(patterns) and patterns[0] in PATTERNS and all(pattern in BEFORE for pattern in patterns[1:])
