"""Forms: the text that a template writes around messages, with holes for their texts, learned from proved turns.

A form filled with the texts of other messages is what the template writes for them, byte for byte. So a turn that
equals a filled form needs no further proof, and any other turn is proved in full.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from sft_core.data.proof.decoded import MARK

_MOST_FORMS = 8  # of a shape; the form that was used longest ago makes room
_REQUIRED_ROLES = ("user", "tool")  # a form has holes for their texts; a history may lack the texts of others
# How templates write a text: as it is, trimmed, inside JSON. No template quotes the text of an assistant.
_WRITINGS = (lambda text: text, str.strip, lambda text: json.dumps(text, ensure_ascii=False)[1:-1])
_NUM_WRITINGS_SAID = 2  # of an assistant's text


class Hole(NamedTuple):
    """The place of a text in a form."""

    number: int
    writing: int


Pattern = tuple[bytes | Hole, ...]


class Texts(NamedTuple):
    """The texts of a segment's messages: of those before its trained turn, and of the turn."""

    history: list[str]
    roles: list[str]  # the role of each text of the history
    said: list[str]


class Form(NamedTuple):
    """The form of a segment of a row: from the end of a trained turn to the stop token of the next."""

    opening: tuple[Hole, ...] | None  # texts before `history`, anywhere, if the segment begins a row; else None
    history: Pattern
    said: Pattern


class Forms:
    """Forms by shape. A shape is everything but the texts that decides how a template writes and trains a turn."""

    def __init__(self) -> None:
        self._by_shape: dict[Hashable, list[Form]] = {}
        self.num_learned = 0

    def __contains__(self, shape: Hashable) -> bool:
        return shape in self._by_shape

    def fit(self, shape: Hashable, history: bytes, said: bytes, texts: Texts) -> bool:
        """Whether the segment equals a known form filled with the texts."""
        known = self._by_shape.get(shape, [])
        for place, form in enumerate(known):
            if said == _fill(form.said, texts.said) and _stands(form, history, texts.history):
                if place:
                    known.insert(0, known.pop(place))
                return True
        return False

    def learn(self, shape: Hashable, history: bytes, said: bytes, texts: Texts, *, is_first: bool) -> None:
        """Learns the form of a proved segment, if the segment has each required text."""
        turn = _find(said, texts.said, _WRITINGS[:_NUM_WRITINGS_SAID], required=range(len(texts.said)))
        required = [number for number, role in enumerate(texts.roles) if role in _REQUIRED_ROLES]
        before = _find(history, texts.history, _WRITINGS, required=required)
        known = self._by_shape.setdefault(shape, [])
        if turn is None or before is None:
            return
        opening = None
        if is_first and "user" in texts.roles:
            opening, before = _without_opening(before, texts.roles.index("user"))
        known.insert(0, Form(opening, before, turn))
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
    start = history.find(filled)  # the first place: a row that begins with another turn has the text twice
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
    """The data with holes at the texts, in their order; None when it lacks a required text."""
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
    """The pattern from the last control token before the first user's text: tools before it differ from row to row."""
    places = (place for place, part in enumerate(pattern) if isinstance(part, Hole) and part.number >= first_user)
    user = next(places, 0)
    for place in range(user - 1, -1, -1):
        part = pattern[place]
        if isinstance(part, bytes) and MARK in part:
            opening = tuple(part for part in pattern[:place] if isinstance(part, Hole))
            return opening, (part[part.rindex(MARK) :], *pattern[place + 1 :])
    return None, pattern
