"""Text from data as no more than text: nothing in it acts on a terminal, on a page, or in Markdown."""

from __future__ import annotations

import logging
import re

_PICTURES = 0x2400  # the block of Unicode that has a symbol for each of C0
# C0 without tab and line feed, DEL, C1, marks and overrides of the writing direction, U+2028 and U+2029, and halves of
# surrogate pairs, which no encoding can write.
_ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# What begins or ends markup, in CommonMark or HTML; a line's end too, since a line can begin a list or a heading.
_MARKUP = r"[\\`*{}\[\]<>#|!&~$\n\t]|(?<![^\W_])_|_(?![^\W_])|^[-+=](?=[-+=]*(?:\s|$))|^\d(?=\d*[.)](?:\s|$))"
# What a renderer links or replaces by itself, even where it is escaped: addresses, @names, :emoji:.
_LINKED = r"://|\b(?i:www)(?=\.)|@(?=[\w-]+\.)|(?<!\w)@(?=\w)|:(?=[\w+-]+:)"
_SPECIAL = re.compile(f"(?P<linked>{_LINKED})|{_MARKUP}")


def shown(text: str) -> str:
    """The text with a symbol in place of each character that acts instead of showing, as ␛ or <U+202E>.

    Tabs and line feeds stay.
    """
    return _ACTING.sub(lambda match: _symbol(match[0]), text)


def in_one_line(text: str) -> str:
    """`shown`, with symbols for tabs and line feeds as well."""
    return shown(text).replace("\n", _symbol("\n")).replace("\t", _symbol("\t"))


def in_json(text: str) -> str:
    """JSON that means the same, with an escape in place of each character that acts."""
    return _ACTING.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def as_markup(text: str) -> str:
    """Markdown, and HTML as well, that shows the text as it is; it has no line feed of its own.

    A browser resolves a character reference after it has read the markup, and so does Markdown: no character that is
    written as one begins or ends anything.
    """
    return _SPECIAL.sub(_plain, shown(text))


def show_error(error: BaseException) -> None:
    """Makes the error's text, its notes, and the errors that it came from what `shown` makes of them."""
    errors: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is None or any(current is other for other in errors):
            continue
        errors.append(current)
        waiting += [current.__cause__, current.__context__]
    for each in errors:
        each.args = tuple(shown(part) if isinstance(part, str) else part for part in each.args)
        if notes := getattr(each, "__notes__", None):
            notes[:] = map(shown, notes)


def log_as_text(level: int) -> None:
    """Logs messages alone to the standard error, as `shown` has them; nothing where logging is set up already."""
    handler = logging.StreamHandler()
    handler.setFormatter(_TextFormatter("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def _symbol(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(_PICTURES + code)
    return "␡" if code == 0x7F else f"<U+{code:04X}>"


def _plain(match: re.Match[str]) -> str:
    # An element of its own parts the text in two, and neither part is a link.
    return f"<span>{match[0]}</span>" if match["linked"] else f"&#{ord(match[0])};"
