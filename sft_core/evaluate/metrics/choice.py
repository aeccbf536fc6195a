"""The metric `choice`: the letter of a multiple choice that a text states."""

from __future__ import annotations

import re

from sft_core.evaluate.metrics.metric import Metric

# "the answer is (B)", "Answer: **B**". A small letter only where no word can go on: "the answer is a dog" chooses none.
_LETTER = r"[\(\[]?\s*(?:([A-Z])(?![A-Za-z0-9'’])|([a-z])(?=[\)\]\}.,;*]|\s*\Z))"
_STATED = re.compile(
    r"\b(?i:answer|option|choice)\b(?i:(?:\s+(?:to|for)\b[^.\n]{0,80}?)?\s+(?:is|was|would\s+be))?"
    r"(?i:\s+(?:option|choice|letter)\b)?[\s:*_\"'$]*(?:\\(?:boxed|text|mathrm)\{\s*)*" + _LETTER
)
_BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*[\(\[]?([A-Za-z])[\)\]]?\s*\}")
_ALONE = re.compile(r"[\s*_\"'`$]*[\(\[]?([A-Za-z])[\)\]]?[.:]?[\s*_\"'`$]*\Z")
_LEADING = re.compile(r"[\s*_]*(?:[\(\[]([A-Za-z])[\)\]]|([A-Z])[*_]*[.\):,](?![A-Za-z0-9]))")
_BRACKETED = re.compile(r"[\(\[]([A-Z])[\)\]]")


def choice_letter(text: str) -> str | None:
    """The letter that an answer chooses, as a capital; None for no letter, and for several without a decision.

    In this order: a letter alone; the last that is boxed or stated as the answer; a letter that leads the text, as
    "B. Paris"; a letter in brackets, where all of these are the same. A letter inside a word does not
    count, and neither does the article.
    """
    if match := _ALONE.match(text):
        return match[1].upper()
    stated = [match for pattern in (_STATED, _BOXED) for match in pattern.finditer(text)]
    if match := max(stated, key=lambda match: match.end(), default=None) or _LEADING.match(text):
        return next(letter for letter in match.groups() if letter).upper()
    bracketed = {*_BRACKETED.findall(text)}
    return bracketed.pop() if len(bracketed) == 1 else None


class Choice(Metric):
    """The letter of a multiple choice, wherever the output states it."""

    name = "choice"
    is_share = True

    def read(self, answer: str) -> str:
        letter = choice_letter(answer)
        if letter is None:
            raise ValueError(f"found {answer[:80]!r}; choice wants the letter of the right one, as 'B'")
        return letter

    def score(self, output: str, wanted: str) -> float:
        return float(choice_letter(output) == wanted)
