"""Ids by pre-token: a text is cut where its tokenizer cuts it before merging, and each distinct part is encoded once.

A tokenizer whose pre-tokenizer is made of regular expressions and byte-level (GPT-2's, Llama 3's, Qwen's, SmolLM's)
merges nothing across those cuts: the ids of a text are those of its pre-tokens, and most of these were seen before.
Invariant: the ids are the tokenizer's own. Where that is not certain there are none, and the tokenizer is asked.
"""

from __future__ import annotations

import array
import functools
import json
import re
import unicodedata
from typing import TYPE_CHECKING, Any

import regex

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

_MOST_KNOWN = 1 << 18  # pre-tokens whose ids are kept: about 60 MB
_LONGEST_KNOWN = 64  # characters; what is longer hardly comes again
# What ByteLevel cuts by itself (tokenizers, pre_tokenizers/byte_level.rs).
_BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Parts of regular expressions that Oniguruma, the tokenizers' engine, and Python's engines read alike. A quantifier
# such as {1,3}+ is not among them: it is possessive for one and a repetition for the other.
_PROPERTY = r"\\[pP]\{\^?\w+\}"
_CLASS = rf"{_PROPERTY}|\\[sSdDwW]"
_PLAIN = rf"{_CLASS}|\\[rnt]|\\[^\w\s]"
_PART = re.compile(rf"{_PLAIN}|\[\^?(?:{_PLAIN}|[^\\\[\]&])+\]|\(\?(?:i?:|[!=])|\}}(?![+?])|[^\\\[(.^$}}]", re.DOTALL)
_PICTOGRAPHS = range(0x1F000, 0x1FB00)
_ASCII = "".join(map(chr, range(128)))
_BEYOND_ASCII = "\u0100"  # for a set of no ASCII character: no text that it is searched in has it


class PreTokenEncoder:
    """Ids of texts by one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, patterns: list[str], added: dict[str, int], *, is_nfc: bool):
        from tokenizers import Tokenizer, pre_tokenizers

        by_itself = Tokenizer(tokenizer.model)
        by_itself.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._ids = _Ids(by_itself, {token: pack([index]) for token, index in added.items()})
        self._is_nfc = is_nfc
        self._classes = frozenset(name for pattern in patterns for name in re.findall(_CLASS, pattern))
        self._first = [regex.compile(f"({pattern})") for pattern in patterns[:-1]]
        self._find = regex.compile(patterns[-1]).findall
        self._find_ascii = re.compile(_for_ascii(patterns[-1]), re.ASCII).findall  # takes half the time
        longest_first = sorted(added, key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if added else None

    @classmethod
    def of(cls, tokenizer: Tokenizer, added: dict[int, AddedToken]) -> PreTokenEncoder | None:
        """None for a tokenizer of another kind. added: the added tokens to be known, by id."""
        from tokenizers import models

        patterns = _patterns(_settings(tokenizer)["pre_tokenizer"] or {})
        normalizer = _settings(tokenizer)["normalizer"]
        tokens = added.values()
        if (
            not patterns
            or normalizer not in (None, {"type": "NFC"})
            or not isinstance(tokenizer.model, models.BPE)
            or tokenizer.model.dropout
            or any(token.lstrip or token.rstrip or token.single_word for token in tokens)
            or len({token.normalized for token in tokens}) > 1  # which are looked for in turn
        ):
            return None
        ids = {token.content: index for index, token in added.items()}
        return cls(tokenizer, patterns, ids, is_nfc=normalizer is not None)

    def encode(self, text: str) -> bytes | None:
        """The ids as pack() gives them; None for a text in which the tokenizer may see something else."""
        is_ascii = text.isascii()
        if not is_ascii and not (
            _sure(self._classes).issuperset(text) and (not self._is_nfc or unicodedata.is_normalized("NFC", text))
        ):
            return None
        pre_tokens = self._split(text, self._find_ascii if is_ascii else self._find)
        if sum(map(len, pre_tokens)) != len(text):
            return None
        return b"".join(map(self._ids.__getitem__, pre_tokens))

    def _split(self, text: str, find: Any) -> list[str]:
        if self._added is None and not self._first:
            return find(text)
        pre_tokens: list[str] = []
        for place, part in enumerate(self._added.split(text) if self._added else [text]):
            if place % 2:
                pre_tokens.append(part)
            else:
                for finer in functools.reduce(_cut, self._first, [part]):
                    pre_tokens += find(finer)
        return pre_tokens


class _Ids(dict[str, bytes]):
    """Ids of each pre-token that was asked for."""

    def __init__(self, tokenizer: Tokenizer, added: dict[str, bytes]):
        super().__init__(added)
        self._tokenizer, self._added = tokenizer, added

    def __missing__(self, pre_token: str) -> bytes:
        ids = pack(self._tokenizer.encode(pre_token, add_special_tokens=False).ids)
        if len(self) >= _MOST_KNOWN:
            self.clear()
            self.update(self._added)
        if len(pre_token) <= _LONGEST_KNOWN:
            self[pre_token] = ids
        return ids


def pack(ids: list[int]) -> bytes:
    """int32, one after another."""
    return array.array("i", ids).tobytes()


def _settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """How it prepares a text for its model, as JSON."""
    from tokenizers import Tokenizer, models

    without_vocabulary = Tokenizer(models.BPE())  # which would take a while to write
    without_vocabulary.normalizer, without_vocabulary.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    return json.loads(without_vocabulary.to_str())


@functools.cache
def _sure(classes: frozenset[str]) -> frozenset[str]:
    """Characters in common use that the tokenizers library and Python class alike: each has a Unicode of its own."""
    from tokenizers import Regex, pre_tokenizers

    characters = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000), *_PICTOGRAPHS]))
    sure = set(characters)
    for name in classes:
        others = pre_tokenizers.Split(Regex(f"{name}+"), "removed").pre_tokenize_str(characters)
        sure -= set("".join(part for part, _ in others)) ^ set(regex.sub(name, "", characters))
    return frozenset(sure)


def _patterns(pre_tokenizer: dict[str, Any]) -> list[str]:
    """The regular expressions by which a text is cut, one after another; none of them for another pre-tokenizer."""
    parts = pre_tokenizer["pretokenizers"] if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    patterns: list[str] = []
    for part in parts[:-1]:
        match part:
            case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
                patterns.append(pattern)
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(r"\p{N}")
            case _:
                return []
    match parts[-1]:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(use_regex)}:
            patterns += [_BYTE_LEVEL] if use_regex else []
        case _:
            return []
    is_read_alike = all("".join(_PART.findall(pattern)) == pattern for pattern in patterns)
    return patterns if is_read_alike else []


def _for_ascii(pattern: str) -> str:
    """The same for texts of ASCII alone, without the properties that Python's own regular expressions lack."""
    return "".join(
        re.sub(_PROPERTY, _ascii_of if part.startswith("[") else lambda name: f"[{_ascii_of(name)}]", part)
        for part in _PART.findall(pattern)
    )


def _ascii_of(name: re.Match[str]) -> str:
    return re.escape("".join(regex.findall(name[0], _ASCII)) or _BEYOND_ASCII)


def _cut(texts: list[str], pattern: Any) -> list[str]:
    return [part for text in texts for part in pattern.split(text) if part]
