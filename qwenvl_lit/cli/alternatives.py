"""Values of free-text keys that a sweep varies: `-m data.train=a.jsonl,b.jsonl` is two jobs."""

from __future__ import annotations

from collections.abc import Sequence

from qwenvl_lit.cli.overrides import quote_free_text, value_of

SWEPT = (
    "adapter.targets",
    "data.root",
    "data.test",
    "data.train",
    "data.validation",
    "model.path",
)
CLOSING = {"[": "]", "{": "}", "(": ")"}


def is_sweep(arguments: Sequence[str]) -> bool:
    """Whether the arguments start several jobs: `-m`, or `sweep=NAME`."""
    if not {"-m", "--multirun"}.isdisjoint(arguments):
        return True
    return value_of(arguments, "sweep") not in (None, "none")


def quote_alternatives(argument: str) -> str:
    """Quotes each of the alternatives of a free-text key of a sweep; quoting twice is the same.

    Commas within quotes and brackets do not separate alternatives.

    >>> quote_alternatives("data.train=a.jsonl,[b.jsonl,c d.jsonl]")
    "data.train='a.jsonl',['b.jsonl','c d.jsonl']"
    """
    key, equals, value = argument.partition("=")
    if key not in SWEPT or not equals:
        return quote_free_text(argument)
    alternatives = []
    for alternative in split_alternatives(value):
        quoted = quote_free_text(f"{key}={alternative}")
        alternatives.append(quoted.removeprefix(f"{key}="))
    return f"{key}={','.join(alternatives)}"


def alternatives_of(arguments: Sequence[str], key: str) -> list[str]:
    """Returns the arguments `key=value` that single jobs get: one, without a sweep.

    >>> alternatives_of(["-m", "data.train=a.jsonl,b.jsonl"], "data.train")
    ['data.train=a.jsonl', 'data.train=b.jsonl']
    """
    given = [argument for argument in arguments if argument.partition("=")[0] == key][-1:]
    if not given or key not in SWEPT or not is_sweep(arguments):
        return given
    return [f"{key}={value}" for value in split_alternatives(given[0].partition("=")[2])]


def split_alternatives(text: str) -> list[str]:
    """Splits a text at its commas, except for those within quotes and brackets.

    A quote begins an alternative or an element; elsewhere it is an apostrophe. A bracket that is
    never closed is text.

    >>> split_alternatives(r"h.\\d{1,2}.attn,'a,b',it's")
    ['h.\\\\d{1,2}.attn', "'a,b'", "it's"]
    """
    pieces, start, position = [], 0, 0
    while position < len(text):
        character = text[position]
        if character == ",":
            pieces.append(text[start:position])
            start = position + 1
        elif character == "'" and text[start:position].strip() == "":
            position = _end_of_quote(text, position)
        elif character in CLOSING:
            position = _end_of_bracket(text, position)
        position += 1
    return [*pieces, text[start:]]


def _end_of_quote(text: str, start: int) -> int:
    """Returns the position of the closing quote, or `start` if there is none."""
    position = start + 1
    while position < len(text):
        if text[position] == "\\":
            position += 1
        elif text[position] == "'":
            return position
        position += 1
    return start


def _end_of_bracket(text: str, start: int) -> int:
    """Returns the position of the closing bracket, or `start` if there is none."""
    expected = [CLOSING[text[start]]]
    position = start + 1
    while position < len(text):
        character = text[position]
        if character == "'" and text[position - 1] in "[{(,: ":
            position = _end_of_quote(text, position)
        elif character in CLOSING:
            expected.append(CLOSING[character])
        elif character == expected[-1]:
            expected.pop()
            if not expected:
                return position
        position += 1
    return start
