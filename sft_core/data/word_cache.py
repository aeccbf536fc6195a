r"""Ids of words that were seen before: a text is cut where its tokenizer cuts in any case, and each part encoded once.

Byte-pair encoding merges within the parts that a pre-tokenizer makes. Those of GPT-2, GPT-4, Llama 3, Qwen, gpt-oss,
DeepSeek and their kin, listed here, all end a part
  - after an ASCII letter that another ASCII character follows, if that is neither a letter nor an apostrophe;
  - before a space that an ASCII letter follows.
And what they look ahead for, a last white space before something else, is the same for a text that ends there.
Invariant: the ids are the tokenizer's own. One of another kind is asked for each text whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

_MOST_KNOWN = 1 << 18  # words whose ids are kept: about 50 MB
_LONGEST_KNOWN = 64  # characters; what is longer hardly comes again
_CHARACTERS_AT_ONCE = 1 << 20

_LETTERS = r"[A-Za-z]+(?:['\x80-\U0010FFFF][^A-Za-z]*[A-Za-z]*)*"
_WORD = re.compile(rf" ?{_LETTERS}|[^A-Za-z]+(?= [A-Za-z])|[^A-Za-z]+(?:{_LETTERS})?")

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
# Those that come before one of these, in DeepSeek's: they part digits and scripts of East Asia from the rest.
BEFORE = (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+")


split_words = _WORD.findall  # of a text without added tokens


def first_word(text: str) -> str:
    """Raises ValueError for an empty text."""
    found = _WORD.match(text)
    if found is None:
        raise ValueError("an empty text has no words")
    return found[0]


class WordCache:
    """Encodes texts by `encode`, which is asked for each distinct word of theirs.

    encode: int32 ids of each text, of the tokenizer that `cuts_at_words` was asked about. added: its added tokens.
    """

    def __init__(self, encode: Callable[[list[str]], list[bytes]], added: Iterable[str]):
        self._encode = encode
        longest_first = sorted(added, key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        self._ids: dict[str, bytes] = {}

    def encode(self, texts: list[str]) -> list[bytes]:
        """Ids of each text, as int32."""
        encoded: list[bytes] = []
        cut: list[list[str]] = []
        num_characters = 0
        for text in texts:
            cut.append(self._cut(text))
            num_characters += len(text)
            if num_characters >= _CHARACTERS_AT_ONCE:
                encoded += self._joined(cut)
                cut, num_characters = [], 0
        return encoded + self._joined(cut)

    def _cut(self, text: str) -> list[str]:
        parts = self._added.split(text) if self._added else [text]
        words = split_words(parts[0])
        for token, part in zip(parts[1::2], parts[2::2], strict=True):
            words.append(token)
            words += split_words(part)
        return words

    def _joined(self, cut: list[list[str]]) -> list[bytes]:
        missing = list(set().union(*cut).difference(self._ids))
        if len(self._ids) + len(missing) > _MOST_KNOWN:
            self._ids.clear()
            missing = list(set().union(*cut))
        self._ids.update(zip(missing, self._encode(missing), strict=True))
        encoded = [b"".join(map(self._ids.__getitem__, words)) for words in cut]
        for word in missing:
            if len(word) > _LONGEST_KNOWN:
                del self._ids[word]
        return encoded


def cuts_at_words(tokenizer: Tokenizer, added: Iterable[AddedToken]) -> bool:
    """Whether the tokenizer, which knows these added tokens, is of the kind whose words can be encoded one by one."""
    from tokenizers import models

    state = settings(tokenizer)
    added = list(added)
    return (
        isinstance(tokenizer.model, models.BPE)
        and not tokenizer.model.dropout
        and (state["normalizer"] is None or state["normalizer"] == {"type": "NFC"})
        and _is_known(state["pre_tokenizer"] or {})
        # These are found before anything else: the longest first, whatever stands around them.
        and not any(token.lstrip or token.rstrip or token.single_word for token in added)
        and len({token.normalized for token in added}) <= 1
        and not (state["normalizer"] and any(token.normalized for token in added))
    )


def settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """How it prepares a text for its model and writes one, as in its JSON: normalizer, pre_tokenizer, decoder."""
    from tokenizers import Tokenizer, models

    without_vocabulary = Tokenizer(models.BPE())  # which takes a while to write and to read
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        setattr(without_vocabulary, part, getattr(tokenizer, part))
    return json.loads(without_vocabulary.to_str())


def _is_known(pre_tokenizer: dict[str, Any]) -> bool:
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
