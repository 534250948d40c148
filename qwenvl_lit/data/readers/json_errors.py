"""Explains in words what is wrong with JSON text."""

from __future__ import annotations

import json

_PYTHON_NAMES = {"True": "true", "False": "false", "None": "null"}


def explain(error: json.JSONDecodeError) -> str:
    """Returns the problem and its remedy, without the place.

    >>> try:
    ...     json.loads('{"a": 1,}')
    ... except json.JSONDecodeError as error:
    ...     print(explain(error))
    the comma before } must be removed
    """
    rest = error.doc[error.pos : error.pos + 5]
    before = error.doc[: error.pos].rstrip()[-1:]
    if before == "," and rest[:1] in ("]", "}"):
        return f"the comma before {rest[0]} must be removed"
    if error.msg.startswith("Extra data") and rest.startswith(","):
        return "the comma after the row must be removed; lines of a jsonl file do not end with one"
    if error.msg.startswith("Extra data") and rest.startswith("{"):
        return "another row begins on this line; write each row on a line of its own"
    if rest.startswith("'"):
        return "names and texts must stand in double quotes, not in single ones"
    for name, json_name in _PYTHON_NAMES.items():
        if rest.startswith(name):
            return f"{name} must be written {json_name}"
    is_control = error.msg.startswith("Invalid control character")
    ends_in_text = is_control and not error.doc[error.pos :].strip()
    if ends_in_text or error.msg.startswith("Unterminated string"):
        return "a text is not closed by a double quote"
    if is_control and rest[:1] in ("\n", "\r", "\t"):
        return r"a line break or tab within a text must be written as \n or \t"
    return error.msg.removesuffix(" at")
