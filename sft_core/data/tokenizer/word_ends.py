"""Where words end: at places at which every pre-tokenizer listed in word_cache ends a part.

- after an ASCII letter that another ASCII character follows, if that is neither a letter nor an apostrophe;
- after an ASCII digit that another ASCII character follows, if that is neither a digit nor a letter;
- before an ASCII digit that follows an ASCII symbol;
- before a space that an ASCII letter or symbol follows.

Each end lies before an ASCII character, so a word of a UTF-8 text is UTF-8 too.
"""

import itertools

import numpy as np

NOT_ASCII, _LETTER, _DIGIT, _SYMBOL, _APOSTROPHE, _SPACE, _CONTROL = KINDS = range(7)


def _kinds() -> np.ndarray:
    kinds = np.full(256, NOT_ASCII, np.uint8)
    kinds[:0x80] = _CONTROL
    kinds[ord("!") : ord("~") + 1] = _SYMBOL
    kinds[ord("a") : ord("z") + 1] = kinds[ord("A") : ord("Z") + 1] = _LETTER
    kinds[ord("0") : ord("9") + 1] = _DIGIT
    kinds[ord("'")] = _APOSTROPHE
    kinds[ord(" ")] = _SPACE
    return kinds


def _is_end(before: int, here: int, after: int) -> bool:
    if here == NOT_ASCII:
        return False
    if before == _LETTER:
        return here not in (_LETTER, _APOSTROPHE)
    if before == _DIGIT:
        return here not in (_DIGIT, _LETTER)
    if here == _DIGIT:
        return before in (_SYMBOL, _APOSTROPHE)
    return here == _SPACE and after in (_LETTER, _SYMBOL, _APOSTROPHE)


KIND_OF_BYTE = _kinds()  # uint8, shape (256,)
# Whether a word ends before a byte: bool, [kind of the byte before it, its kind, kind of the byte after it]. After the
# last byte of a text, NOT_ASCII stands for the next.
IS_END = np.array([_is_end(*kinds) for kinds in itertools.product(KINDS, repeat=3)]).reshape(3 * (len(KINDS),))

_KIND_OF_BYTE, _IS_END = KIND_OF_BYTE.tolist(), IS_END.tolist()


def first_word(text: str) -> str:
    """The first word of a text without added tokens."""
    data = text.encode()
    return data[: next((place for place in range(1, len(data)) if _ends_at(data, place)), None)].decode()


def last_word(text: str) -> str:
    """The last word of a text without added tokens."""
    data = text.encode()
    return data[next((place for place in range(len(data) - 1, 0, -1) if _ends_at(data, place)), 0) :].decode()


def _ends_at(data: bytes, place: int) -> bool:
    after = _KIND_OF_BYTE[data[place + 1]] if place + 1 < len(data) else NOT_ASCII
    return _IS_END[_KIND_OF_BYTE[data[place - 1]]][_KIND_OF_BYTE[data[place]]][after]
