"""Text of files and models, made safe for a terminal, which obeys control characters."""

from __future__ import annotations

import logging
import unicodedata


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


class PrintableRecords(logging.Filter):
    """Escapes control characters in the messages of a handler; line breaks stay."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage(), keep="\n\t"), ()
        return True
