"""What a template writes around what is said, learned from turns that are proved: a form, to be filled with texts.

A form that is filled with what other messages say is what the template would write for them, byte for byte. So a
turn that equals a known form needs no further proof, and any other is proved in full.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from sft_core.data.proof.decoded import MARK

_MOST_FORMS = 8  # of a shape; one that no row has had for long makes room
_FOUND = ("user", "tool")  # whose texts a form has holes for; others' may be left out of the history
# How templates write a text: as it is, trimmed, inside of JSON. What an assistant says is never quoted.
_WRITINGS = (lambda text: text, str.strip, lambda text: json.dumps(text, ensure_ascii=False)[1:-1])
_SAID = 2  # of the writings


class Hole(NamedTuple):
    """Where a text goes."""

    number: int
    writing: int


Pattern = tuple[bytes | Hole, ...]


class Texts(NamedTuple):
    """What the messages of a segment say: those before its trained turn, then the turn's own."""

    history: list[str]
    roles: list[str]  # who says each of history
    said: list[str]


class Form(NamedTuple):
    """A segment of a row: from the end of the trained turn before to the stop token of the next."""

    opening: tuple[Hole, ...] | None  # what stands somewhere before `history`, where a row begins; else None
    history: Pattern
    said: Pattern


class Forms:
    """Forms by shape: what else decides how a template writes a turn, and from where it is trained."""

    def __init__(self) -> None:
        self._by_shape: dict[Hashable, list[Form]] = {}
        self.num_learned = 0

    def __contains__(self, shape: Hashable) -> bool:
        return shape in self._by_shape

    def fit(self, shape: Hashable, history: bytes, said: bytes, texts: Texts) -> bool:
        """Whether the segment is a known form, filled with the texts."""
        known = self._by_shape.get(shape, [])
        for place, form in enumerate(known):
            if said == _fill(form.said, texts.said) and _stands(form, history, texts.history):
                if place:
                    known.insert(0, known.pop(place))
                return True
        return False

    def learn(self, shape: Hashable, history: bytes, said: bytes, texts: Texts, *, is_first: bool) -> None:
        """Takes the form of a proved segment, where each text that it is about can be found in it."""
        own = _find(said, texts.said, _WRITINGS[:_SAID], required=range(len(texts.said)))
        required = [number for number, role in enumerate(texts.roles) if role in _FOUND]
        before = _find(history, texts.history, _WRITINGS, required=required)
        known = self._by_shape.setdefault(shape, [])
        if own is None or before is None:
            return
        opening = None
        if is_first and "user" in texts.roles:
            opening, before = _without_opening(before, texts.roles.index("user"))
        known.insert(0, Form(opening, before, own))
        del known[_MOST_FORMS:]
        self.num_learned += 1


def _fill(pattern: Pattern, texts: Sequence[str]) -> bytes:
    return b"".join([part if isinstance(part, bytes) else _written(texts, part) for part in pattern])


def _written(texts: Sequence[str], hole: Hole) -> bytes:
    return _WRITINGS[hole.writing](texts[hole.number]).encode()


def _stands(form: Form, history: bytes, texts: Sequence[str]) -> bool:
    filled = _fill(form.history, texts)
    if form.opening is None:
        return history == filled
    start = history.find(filled)  # the first: a row that begins with another turn has it twice
    if start < 0 or start + len(filled) != len(history):
        return False
    position = 0
    for text in (_written(texts, hole) for hole in form.opening):
        place = history.find(text, position, start)
        if place < 0:
            return False
        position = place + len(text)
    return True


def _find(data: bytes, texts: Sequence[str], writings: Sequence, *, required: Iterable[int]) -> Pattern | None:
    """The data with holes where the texts stand, in their order; None when a required one does not."""
    pattern: list[bytes | Hole] = []
    position = 0
    for number, text in enumerate(texts):
        for hole in (Hole(number, writing) for writing in range(len(writings))):
            written = _written(texts, hole)
            start = data.find(written, position) if written else -1
            if start >= 0:
                pattern += [data[position:start], hole]
                position = start + len(written)
                break
        else:
            if text.strip() and number in required:
                return None
    return (*pattern, data[position:])


def _without_opening(pattern: Pattern, first_user: int) -> tuple[tuple[Hole, ...] | None, Pattern]:
    """The pattern from the last control token before what the first user says: tools differ from row to row."""
    places = (place for place, part in enumerate(pattern) if isinstance(part, Hole) and part.number >= first_user)
    user = next(places, 0)
    for place in range(user - 1, -1, -1):
        part = pattern[place]
        if isinstance(part, bytes) and MARK in part:
            opening = tuple(part for part in pattern[:place] if isinstance(part, Hole))
            return opening, (part[part.rindex(MARK) :], *pattern[place + 1 :])
    return None, pattern
