"""The layouts in which rows are written: a table from the keys of a row to the function that reads it. A new layout is one more entry."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwenvl_lit.types import DataError, Role

Row = Mapping[str, Any]
ROLES: dict[str, Role] = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
VQA_PROMPT = "{picture}{question} Answer:"  # of Qwen-VL's published evaluation


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """What a row says, before its text is taken apart."""

    turns: Sequence[tuple[Role, str]]  # text with `<img>path</img>`, `<image>`, `<ref-object>`, `<bbox>` and direct markup
    images: Sequence[str] = ()  # what the `<image>` tags stand for
    objects: Sequence[Any] = ()  # what `<ref-object>` and `<bbox>` stand for, as written
    references: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to write a row."""

    needs: tuple[str, ...]  # a row with these keys has this layout
    knows: tuple[str, ...]  # further keys that `draft` reads
    draft: Callable[[Row, str], Draft]

    def read(self, row: Row, prompt: str) -> Draft:
        """The draft of a row; `prompt` is how questions of VQA sets are asked.

        Raises:
            DataError: a key is missing or has a value of the wrong kind.
        """
        if missing := [key for key in self.needs if key not in row]:
            raise DataError(
                f"lacks {missing}, which the first row of the file has; its keys are {list(row)}. Keep each layout in its own file"
            )
        return self.draft(row, prompt)

    def columns(self, row: Row) -> dict[str, str]:
        """The plain values that the layout does not read, as text."""
        read = {"id", *self.needs, *self.knows}
        return {key: str(value) for key, value in row.items() if key not in read and isinstance(value, str | int | float)}


def layout_of(row: Row) -> Layout:
    """The layout that the keys of `row` tell.

    Raises:
        DataError: `row` has no known layout, or several.
    """
    fitting = [layout for layout in LAYOUTS if all(key in row for key in layout.needs)]
    if len(fitting) != 1:
        known = "; ".join(f"{' + '.join(layout.needs)} [{', '.join(layout.knows)}]" for layout in LAYOUTS)
        raise DataError(
            f"keys {list(row)} fit {'several layouts' if fitting else 'no known layout'}. Known, optional keys in brackets: {known}"
        )
    return fitting[0]


def around_picture(prompt: str) -> tuple[str, str]:
    """What stands before and after `{picture}`.

    Raises:
        DataError: `prompt` does not have it exactly once.
    """
    before, *after = prompt.split("{picture}")
    if len(after) != 1:
        raise DataError(f"a prompt says once where the {{picture}} is, got {prompt!r}")
    return before, after[0]


def _conversations(row: Row, prompt: str) -> Draft:
    turns = []
    for number, turn in enumerate(_list(row, "conversations"), 1):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or turn.get("from") not in ROLES:
            raise DataError(f'turn {number} is {{"from": one of {", ".join(ROLES)}, "value": text}}, got {_short(turn)}')
        turns.append((ROLES[turn["from"]], turn["value"]))
    return Draft(turns=_system(row) + turns, images=_images(row), objects=_objects(row))


def _query(row: Row, prompt: str) -> Draft:
    turns = _system(row)
    for pair in _list(row, "history"):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(f"`history` is a list of [question, answer], got {_short(pair)} in it")
        turns += [("user", pair[0]), ("assistant", pair[1])]
    turns.append(("user", _text(row, "query")))
    if row.get("response") is not None:
        turns.append(("assistant", _text(row, "response")))
    return Draft(turns=turns, images=_images(row), objects=_objects(row))


def _vqa(row: Row, prompt: str) -> Draft:
    if row.get("answers") is not None:
        answers = tuple(answer["answer"] if isinstance(answer, dict) else answer for answer in _list(row, "answers"))
    else:
        answers = (row["answer"],) if row.get("answer") is not None else ()
    if not all(isinstance(answer, str) for answer in answers):
        raise DataError(f"answers are text, got {_short(answers)}")
    before, after = (text.replace("{question}", _text(row, "question")) for text in around_picture(prompt))
    turns: list[tuple[Role, str]] = [("user", f"{before}<img>{_text(row, 'image')}</img>{after}")]
    if answers:
        turns.append(("assistant", Counter(answers).most_common(1)[0][0]))
    return Draft(turns=turns, references=answers)


LAYOUTS = (
    Layout(("conversations",), ("system", "images", "image", "objects"), _conversations),
    Layout(("query",), ("response", "system", "history", "images", "image", "objects"), _query),
    Layout(("image", "question"), ("answer", "answers", "question_id"), _vqa),
)


def _text(row: Row, key: str) -> str:
    if not isinstance(row[key], str):
        raise DataError(f"`{key}` is text, got {_short(row[key])}")
    return row[key]


def _list(row: Row, key: str) -> list:
    value = row.get(key)
    if value is not None and not isinstance(value, list):
        raise DataError(f"`{key}` is a list, got {_short(value)}")
    return value or []


def _system(row: Row) -> list[tuple[Role, str]]:
    return [] if row.get("system") is None else [("system", _text(row, "system"))]


def _images(row: Row) -> list[str]:
    images = [_text(row, "image")] if row.get("image") is not None else _list(row, "images")
    if not all(isinstance(image, str) for image in images):
        raise DataError(f"`images` is a list of paths, got {_short(images)}")
    return images


def _objects(row: Row) -> list:
    objects = row.get("objects")
    if not isinstance(objects, str):
        return _list(row, "objects")
    try:
        return _list({"objects": json.loads(objects)}, "objects")
    except json.JSONDecodeError as fault:
        raise DataError(f"`objects` is a list, or a list as JSON text; it is not JSON: {fault}") from None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
