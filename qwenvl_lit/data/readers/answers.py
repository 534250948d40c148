"""Reads the answers that a row gives beside its question, or beside its turns."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from qwenvl_lit.data.readers.keys import Row, list_of, short
from qwenvl_lit.types import DataError


def answers_of(row: Row) -> tuple[str, ...]:
    """Returns `answers`, or `answer`, which may be one answer or a list of them."""
    given = row.get("answer")
    if row.get("answers") is not None:
        try:
            given = list_of(row, "answers")
        except DataError as error:
            raise DataError(f"{error}; a single answer may stand in `answer`") from None
    return _answer_texts(given if isinstance(given, list) else [given])


def accepted_answers(row: Row) -> tuple[str, ...]:
    """Returns `answers`, all of which count as right."""
    return _answer_texts(list_of(row, "answers"))


def _answer_texts(given: Sequence[Any]) -> tuple[str, ...]:
    answers = []
    for answer in given:
        if isinstance(answer, dict):
            answers.append(answer.get("answer"))
        elif answer is not None:
            answers.append(answer)
    if not all(isinstance(answer, str) for answer in answers):
        raise DataError(f"answers must be text, got {short(answers)}")
    return tuple(answers)


def most_frequent(answers: Sequence[str]) -> str:
    [(answer, _)] = Counter(answers).most_common(1)
    return answer


def right_choice(answer: Any, choices: Sequence[str]) -> int:
    """Returns the index of the right choice, which a cell of a table has as text."""
    index = answer
    if isinstance(answer, str) and re.fullmatch(r"\s*[0-9]{1,3}\s*", answer):
        index = int(answer)
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(choices):
        raise DataError(
            f"`answer` must be the index of the right choice, 0 to {len(choices) - 1}, got "
            f"{short(answer)}"
        )
    if isinstance(answer, str) and answer in choices and choices.index(answer) != index:
        raise DataError(
            f"`answer` {short(answer)} is the index of {short(choices[index])}, and is a choice "
            f"itself; write the index as a number, in a json or jsonl file"
        )
    return index
