"""Text for a terminal: control characters are escaped, and counts have the right noun."""

from __future__ import annotations

import logging
import shutil
import sys
import unicodedata
from textwrap import fill


def printable(text: str, *, keep: str = "") -> str:
    """Returns one line: control characters and what UTF-8 cannot encode become escape sequences.

    Args:
        keep: control characters that stay, such as a line break.

    >>> printable("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """
    if text.isprintable():
        return text
    characters = []
    for character in text:
        is_blank = unicodedata.category(character) == "Zs"  # an ideographic space, for instance
        if not (character.isprintable() or is_blank or character in keep):
            character = ascii(character)[1:-1]
        characters.append(character)
    return "".join(characters)


def wrapped(text: str, *, indent: int = 0) -> str:
    """Breaks a line between words to the width of the terminal, if it is printed to one.

    Words that are longer, such as paths, are kept whole. A file gets one line.

    Args:
        indent: blanks at the start of all lines but the first.
    """
    if not sys.stdout.isatty():
        return text
    return fill(
        text,
        shutil.get_terminal_size().columns,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def counted(number: int, noun: str) -> str:
    """Returns a number with a noun, whose plural ends in "s".

    >>> counted(1, "row"), counted(1200, "row"), counted(0, "row with notes")
    ('1 row', '1,200 rows', '0 rows with notes')
    """
    first, *rest = noun.split(" ", 1)
    if number != 1:
        first += "s"
    return " ".join((f"{number:,}", first, *rest))


class PrintableRecords(logging.Filter):
    """Escapes control characters in the messages of a handler; line breaks stay."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage(), keep="\n\t"), ()
        return True
