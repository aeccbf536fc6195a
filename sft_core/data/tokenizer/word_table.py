"""Words of texts by number, compiled: a hash table that numbers each distinct word once."""

import numba
import numpy as np

from sft_core.data.tokenizer.word_ends import IS_END, KIND_OF_BYTE, NOT_ASCII

_FNV_OFFSET, _FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)  # of the FNV-1a hash, 64 bits


def ends_of_words(text: np.ndarray, part_ends: np.ndarray, is_whole: np.ndarray) -> np.ndarray:
    """Where each word ends: int64, shape (words,).

    text: uint8, the parts one after another. part_ends: int64, shape (parts,). is_whole: bool, shape (parts,): whether
    the whole part is one word. An empty part has no words.
    """
    # Pass the tables of the other module as arguments: Numba keeps compiled code until this module changes.
    return _ends_of_words(text, part_ends, is_whole, KIND_OF_BYTE, IS_END, NOT_ASCII)


@numba.njit(cache=True)
def _ends_of_words(
    text: np.ndarray,
    part_ends: np.ndarray,
    is_whole: np.ndarray,
    kind_of_byte: np.ndarray,
    is_end: np.ndarray,
    after_last: int,
) -> np.ndarray:
    ends = np.empty(len(text), np.int64)
    num_words = start = 0
    for part in range(len(part_ends)):
        end = part_ends[part]
        if end > start and not is_whole[part]:
            before, here = kind_of_byte[text[start]], kind_of_byte[text[start]]
            for place in range(start, end):
                after = kind_of_byte[text[place + 1]] if place + 1 < end else after_last
                if place > start and is_end[before, here, after]:
                    ends[num_words] = place
                    num_words += 1
                before, here = here, after
        if end > start:
            ends[num_words] = end
            num_words += 1
        start = end
    return ends[:num_words].copy()


@numba.njit(cache=True)
def _hash(text: np.ndarray, start: int, end: int) -> np.uint64:
    value = _FNV_OFFSET
    for place in range(start, end):
        value = (value ^ np.uint64(text[place])) * _FNV_PRIME
    return value ^ (value >> np.uint64(32))


@numba.njit(cache=True)
def _is_same(text: np.ndarray, start: int, end: int, other: np.ndarray, other_start: int, other_end: int) -> bool:
    if end - start != other_end - other_start:
        return False
    for place in range(end - start):  # noqa: SIM110  (a generator is slower compiled)
        if text[start + place] != other[other_start + place]:
            return False
    return True


@numba.njit(cache=True)
def _number(
    text: np.ndarray,
    ends: np.ndarray,
    slots: np.ndarray,
    hashes: np.ndarray,
    known: np.ndarray,
    known_ends: np.ndarray,
    num_known: int,
) -> tuple[np.ndarray, int]:
    """The number of each word, and how many words are known afterwards. New words are added to the table."""
    numbers = np.empty(len(ends), np.int32)
    mask = len(slots) - 1
    start = 0
    for word in range(len(ends)):
        end = ends[word]
        hashed = _hash(text, start, end)
        slot = np.int64(hashed & np.uint64(mask))
        while True:
            number = slots[slot]
            if number < 0:
                number = num_known
                begin = known_ends[number - 1] if number else 0
                slots[slot] = number
                hashes[number] = hashed
                known[begin : begin + end - start] = text[start:end]
                known_ends[number] = begin + end - start
                num_known += 1
                break
            begin = known_ends[number - 1] if number else 0
            if hashes[number] == hashed and _is_same(text, start, end, known, begin, known_ends[number]):
                break
            slot = (slot + 1) & mask
        numbers[word] = number
        start = end
    return numbers, num_known


@numba.njit(cache=True)
def _fill(slots: np.ndarray, hashes: np.ndarray) -> None:
    slots[:] = -1
    mask = len(slots) - 1
    for number in range(len(hashes)):
        slot = np.int64(hashes[number] & np.uint64(mask))
        while slots[slot] >= 0:
            slot = (slot + 1) & mask
        slots[slot] = number


@numba.njit(cache=True)
def gather(values: np.ndarray, ends: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """values[ends[n - 1]:ends[n]] of each number n, one after another. ends, numbers: integers, of one axis."""
    size = 0
    for number in numbers:
        size += ends[number] - (ends[number - 1] if number else 0)
    gathered = np.empty(size, values.dtype)
    place = 0
    for number in numbers:
        for index in range(ends[number - 1] if number else 0, ends[number]):
            gathered[place] = values[index]
            place += 1
    return gathered


class WordTable:
    """Numbers distinct words from 0 on, in the order of their first use."""

    def __init__(self) -> None:
        self._slots = np.full(1 << 12, -1, np.int32)  # more than twice the words: open addressing
        self._hashes = np.empty(0, np.uint64)
        self._words = np.empty(0, np.uint8)
        self._ends = np.empty(0, np.int64)
        self._num_words = 0

    def __len__(self) -> int:
        return self._num_words

    @property
    def num_bytes(self) -> int:
        """The size of all words together."""
        return int(self._ends[self._num_words - 1]) if self._num_words else 0

    def number(self, text: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """The number of each word: int32, shape (words,). text: uint8. ends: int64, where each word ends."""
        most = self._num_words + len(ends)
        self._hashes, self._ends = _with_room(self._hashes, most), _with_room(self._ends, most)
        self._words = _with_room(self._words, self.num_bytes + len(text))
        if 2 * most > len(self._slots):
            self._slots = np.empty(1 << (2 * most).bit_length(), np.int32)
            _fill(self._slots, self._hashes[: self._num_words])
        numbers, self._num_words = _number(
            text, ends, self._slots, self._hashes, self._words, self._ends, self._num_words
        )
        return numbers

    def words(self, first: int) -> list[str]:
        """The words from number `first` on."""
        begin = int(self._ends[first - 1]) if first else 0
        data, start = self._words[begin : self.num_bytes].tobytes(), 0
        words = []
        for end in (self._ends[first : self._num_words] - begin).tolist():
            words.append(data[start:end].decode())
            start = end
        return words


def _with_room(values: np.ndarray, size: int) -> np.ndarray:
    if size <= len(values):
        return values
    larger = np.empty(max(size, 2 * len(values)), values.dtype)
    larger[: len(values)] = values
    return larger
