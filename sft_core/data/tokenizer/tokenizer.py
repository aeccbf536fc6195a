"""The recipe's tokenizer, and the encoding of pieces in which typed control tokens stay text.

Invariant: only the template produces ids of control tokens, never the text of a message.
"""

from __future__ import annotations

import array
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from sft_core.data.tokenizer.word_cache import Component, WordCache, cuts_at_words, settings
from sft_core.data.tokenizer.word_ends import first_word, last_word

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

_WORD_START = "\u2581"  # what SentencePiece writes for a space
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_BORDER = "\ufdd1"  # a noncharacter of Unicode: texts with it are encoded one by one
_WORDS_A_TEXT = 1024
_TEXTS_A_CALL = 256  # bounds the memory: a tokenizer keeps far more of each token than its id
Literals = list[tuple[int, int]]  # character ranges of a piece that look like control tokens and are text


class TokenizerArguments(TypedDict):
    """The keyword arguments of load_tokenizer."""

    path: str
    revision: str | None
    add_special_tokens: list[str]
    eos_token: str | None
    trust_remote_code: bool


def load_tokenizer(
    *, path: str, revision: str | None, add_special_tokens: list[str], eos_token: str | None, trust_remote_code: bool
) -> PreTrainedTokenizerFast:
    """The fast tokenizer with the recipe's tokens added. Raises ValueError for one that cannot be used."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except OSError:
        raise  # it names the place
    except Exception as error:  # of the tokenizer's files: each reader of them has errors of its own
        raise ValueError(f"{path}: the tokenizer cannot be read ({type(error).__name__}: {error})") from None
    if not tokenizer.is_fast:
        raise ValueError(f"{path}: has no fast tokenizer (tokenizer.json); convert it with transformers first")
    new = [token for token in add_special_tokens if token not in tokenizer.get_added_vocab()]
    if new:
        tokenizer.add_special_tokens({"additional_special_tokens": new}, replace_extra_special_tokens=False)
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise ValueError(f"model.eos_token: found {eos_token!r}; it is not a token of {path}")
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token is None:
        raise ValueError(f"{path}: has no end token; set model.eos_token to the one that ends an assistant turn")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer  # type: ignore[return-value]


def control_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The added tokens that a template writes, with their ids. Added runs of white space are text and left out."""
    added = tokenizer.added_tokens_decoder.items()
    return {token.content: index for index, token in added if token.content.strip()}


def stop_tokens(tokenizer: PreTrainedTokenizerFast, extra: list[str]) -> tuple[str, ...]:
    """The tokens at which serving stops, the end token first. Raises ValueError for an unknown token."""
    known = control_tokens(tokenizer)
    for token in extra:
        if token not in known:
            raise ValueError(f"model.stop_tokens: found {token!r}; it is no control token of {tokenizer.name_or_path}")
    return tuple(dict.fromkeys([str(tokenizer.eos_token), *extra]))


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches any of the texts, the longest first. Without texts it matches nothing."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)")


class PieceEncoder:
    """Token ids of text pieces. Each piece is encoded by itself, as a served prompt and a generated answer are.

    Raises ValueError for a tokenizer that puts a space in front of each piece: the pieces would not add up to the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._backend = tokenizer.backend_tokenizer
        self._control = control_tokens(tokenizer)
        self._pattern = any_of(self._control)
        self._whole = _TextEncoder(self._backend, self._backend.get_added_tokens_decoder())
        if self._whole.writes_word_starts():
            raise ValueError(
                f"{tokenizer.name_or_path}: puts a space in front of every piece of text (add_prefix_space or a "
                "SentencePiece prefix), so what is trained would differ from what is served; use a tokenizer without it"
            )

    @functools.cached_property
    def _text_only(self) -> _TextEncoder:
        added = self._backend.get_added_tokens_decoder().items()
        return _TextEncoder(
            self._backend, {index: token for index, token in added if token.content not in self._control}
        )

    def is_boundary(self, before: str, after: str) -> bool:
        """Whether the tokens of both texts together begin with the tokens of `before` alone.

        before, after: without control tokens, at which there is always a border.
        """
        if self._text_only.cuts_at_words:
            before, after = last_word(before), first_word(after)  # no other words can merge
        return self._is_boundary(before, after)

    @functools.lru_cache(maxsize=10_000)  # noqa: B019  (an encoder lives as long as its process's work)
    def _is_boundary(self, before: str, after: str) -> bool:
        alone, both = self._text_only.encode_anew([before, before + after])
        return both.startswith(alone)

    def encode(self, pieces: list[str], literals: Mapping[int, Literals]) -> list[bytes]:
        """Ids of each piece as int32. literals: by number of the piece, ranges that are text although they look like
        control tokens."""
        encoded = self._whole.encode(pieces)
        for number, ranges in literals.items():
            encoded[number] = self._with_literals(pieces[number], ranges)
        return encoded

    def _with_literals(self, piece: str, literals: Literals) -> bytes:
        texts, control = [], []
        start = 0
        for match in self._pattern.finditer(piece):
            if any(match.start() < end and begin < match.end() for begin, end in literals):
                continue
            texts.append(piece[start : match.start()])
            control.append(pack([self._control[match[0]]]))
            start = match.end()
        texts.append(piece[start:])
        encoded = self._text_only.encode(texts)
        return b"".join(itertools.chain.from_iterable(itertools.zip_longest(encoded, control, fillvalue=b"")))


class _TextEncoder:
    """Ids of texts by a tokenizer that knows `added` alone; all other added tokens are text."""

    def __init__(self, tokenizer: Tokenizer, added: dict[int, AddedToken]):
        from tokenizers import AddedToken

        tokens = [token for _, token in sorted(added.items())]
        self._tokenizer = _with_added(tokenizer, tokens)
        # A tokenizer of its own for joined words: in a message, the border is a character like any other.
        self._of_words = _with_added(tokenizer, [*tokens, AddedToken(_BORDER, normalized=False)])
        self._border_id = self._of_words.token_to_id(_BORDER)
        # Removing control tokens renumbers the added tokens after them; `_true_ids` maps them back.
        ids = {self._tokenizer.token_to_id(token.content): index for index, token in added.items()}
        self._true_ids = {renumbered: index for renumbered, index in ids.items() if renumbered != index}
        self.cuts_at_words = cuts_at_words(self._tokenizer, added.values())
        words = WordCache(self._encode_words, [token.content for token in added.values()])
        self.encode = words.encode if self.cuts_at_words else self.encode_anew

    def encode_anew(self, texts: list[str]) -> list[bytes]:
        """Ids of each text, as int32, without the cache of words."""
        encoded = []
        for start in range(0, len(texts), _TEXTS_A_CALL):
            part = texts[start : start + _TEXTS_A_CALL]
            for encoding in self._tokenizer.encode_batch_fast(part, add_special_tokens=False):
                ids = encoding.ids
                encoded.append(pack([self._true_ids.get(token, token) for token in ids] if self._true_ids else ids))
        return encoded

    def _encode_words(self, words: list[str]) -> list[bytes]:
        """As encode_anew, for many short texts: joins them, since an encoding for each would take longer."""
        if self._true_ids or any(_BORDER in word for word in words):
            return self.encode_anew(words)
        encoded: list[bytes] = []
        for start in range(0, len(words), _WORDS_A_TEXT):
            text = _BORDER.join(words[start : start + _WORDS_A_TEXT])
            (encoding,) = self._of_words.encode_batch_fast([text], add_special_tokens=False)
            ids = np.array(encoding.ids, dtype=np.int32)
            borders = ids.itemsize * np.flatnonzero(ids == self._border_id)
            data, begin = ids.tobytes(), 0
            for border in [*borders.tolist(), len(data)]:
                encoded.append(data[begin:border])
                begin = border + ids.itemsize
        return encoded

    def writes_word_starts(self) -> bool:
        encoding = self._tokenizer.encode("a", add_special_tokens=False)
        return len(self._tokenizer.decode(encoding.ids)) != 1 or encoding.tokens[0].startswith(_WORD_START)


def _with_added(tokenizer: Tokenizer, added: list[AddedToken]) -> Tokenizer:
    from tokenizers import Tokenizer

    copy = Tokenizer(tokenizer.model)  # share the model: a vocabulary takes a while to build
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        setattr(copy, part, getattr(tokenizer, part))
    copy.add_tokens(added)
    return copy


def pack(ids: list[int]) -> bytes:
    """The ids as int32, one after another."""
    return array.array("i", ids).tobytes()


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """The bytes of each id in UTF-8: the text of several ids is their bytes one after another.

    Raises ValueError for a vocabulary of another kind.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    kinds = decoder_kinds(tokenizer)
    read: Callable[[str], bytes]
    if "ByteLevel" in kinds:
        read = functools.partial(_byte_level, {character: byte for byte, character in bytes_to_unicode().items()})
    elif kinds & {"Metaspace", "ByteFallback"}:
        read = _word_start
    else:
        raise ValueError(f"{tokenizer.name_or_path}: its tokens are neither bytes nor pieces of text")
    added = {index: token.content.encode() for index, token in tokenizer.added_tokens_decoder.items()}
    texts = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [added[index] if index in added else read(text or "") for index, text in enumerate(texts)]


def decoder_kinds(tokenizer: PreTrainedTokenizerFast) -> set[str]:
    """The types of the decoder and of its parts: ByteLevel, Metaspace, Sequence, ..."""
    return _decoders(settings(tokenizer.backend_tokenizer)["decoder"] or {})


def _decoders(decoder: Component) -> set[str]:
    return {decoder.get("type", ""), *(kind for part in decoder.get("decoders", []) for kind in _decoders(part))}


def _byte_level(alphabet: dict[str, int], token: str) -> bytes:
    return bytes(alphabet[character] for character in token)


def _word_start(token: str) -> bytes:
    if _BYTE_TOKEN.fullmatch(token):
        return bytes([int(token[3:5], 16)])
    return token.replace(_WORD_START, " ").encode()
