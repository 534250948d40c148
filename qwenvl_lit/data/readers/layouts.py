"""The layouts in which rows are written: a table from the keys of a row to the function that reads it. A new layout is one more entry."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from qwenvl_lit.data.readers.files import parse_json
from qwenvl_lit.data.readers.prompts import CHOICE_PROMPT, REFERRING_PROMPT, VQA_PROMPT, ask
from qwenvl_lit.types import DataError, Role

Row = Mapping[str, Any]
ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """What a row says, before its text is taken apart."""

    turns: Sequence[
        tuple[Role, str]
    ]  # text with `<img>path</img>`, `<image>`, `<ref-object>`, `<bbox>` and direct markup
    images: Sequence[str] = ()  # what the `<image>` tags stand for
    objects: Sequence[Any] = ()  # what `<ref-object>` and `<bbox>` stand for, as written
    references: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to write a row."""

    name: str
    needs: tuple[str, ...]  # a row with these keys has this layout
    knows: tuple[str, ...]  # further keys that `draft` reads
    draft: Callable[[Row, str | None], Draft]

    def read(self, row: Row, prompt: str | None) -> Draft:
        """The draft of a row; `prompt` is how questions are asked in the layouts that hold none, None as in Qwen-VL's published evaluation.

        Raises:
            DataError: the row has another layout, or a key has a value of the wrong kind.
        """
        if (found := layout_of(row)).name != self.name:
            raise DataError(
                f"is in the layout `{found.name}`, the first row of the file in `{self.name}`; its keys are {list(row)}. "
                f"Keep each layout in its own file"
            )
        return self.draft(row, prompt)

    def columns(self, row: Row) -> dict[str, str]:
        """The plain values that the layout does not read, as text."""
        read = {"id", *self.needs, *self.knows}
        return {
            key: str(value)
            for key, value in row.items()
            if key not in read and isinstance(value, str | int | float)
        }


def layout_of(row: Row) -> Layout:
    """The layout that the keys of `row` tell; those with the value null do not count.

    Raises:
        DataError: `row` has no known layout, or several.
    """
    for layouts in (LAYOUTS, TEXTS):
        fitting = [
            layout for layout in layouts if all(row.get(key) is not None for key in layout.needs)
        ]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            break
    known = "; ".join(
        f"{' + '.join(layout.needs)} [{', '.join(layout.knows)}]" for layout in LAYOUTS + TEXTS
    )
    names = (
        f"several layouts ({', '.join(layout.name for layout in fitting)})"
        if fitting
        else "no known layout"
    )
    raise DataError(f"keys {list(row)} fit {names}. Known, optional keys in brackets: {known}")


def id_of(row: Row) -> str | None:
    """What a row calls itself, if it does.

    Raises:
        DataError: that is neither text nor a number.
    """
    name = row.get("id") if row.get("id") is not None else row.get("question_id")
    if name is not None and (not isinstance(name, str | int | float) or isinstance(name, bool)):
        raise DataError(f"an id is text or a number, got {_short(name)}")
    return None if name is None else str(name)


def _conversations(row: Row, prompt: str | None) -> Draft:
    return _chat(row, _list(row, "conversations"))


def _messages(row: Row, prompt: str | None) -> Draft:
    return _chat(row, _list(row, "messages"))


def _chat(row: Row, said: Sequence[Any]) -> Draft:
    turns = []
    for number, turn in enumerate(said, 1):
        role = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
        content = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        if not isinstance(role, str) or role not in ROLES or not isinstance(content, str | list):
            raise DataError(
                f'turn {number} is {{"from": one of {", ".join(ROLES)}, "value": text}} or as role and content, got {_short(turn)}'
            )
        turns.append(
            (ROLES[role], content if isinstance(content, str) else _content(number, content))
        )
    return Draft(turns=_system(row) + turns, images=_images(row), objects=_objects(row))


def _content(number: int, items: Sequence[Any]) -> str:
    """Texts and images of a turn as one text; `{"type": "image"}` alone is the next of `images`."""
    written = ""
    for item in items:
        if isinstance(item, dict):  # a table of such items fills up with null
            item = {key: value for key, value in item.items() if value is not None}
        match item:
            case str(text) | {"type": "text", "text": str(text)}:
                written += text
            case {"type": "image_url", "image_url": image}:
                written += f"<img>{_place(image)}</img>"
            case (
                {"type": "image", "image": image}
                | {"type": "image", "path": image}
                | {"type": "image", "url": image}
            ):
                written += f"<img>{_place(image)}</img>"
            case {"type": "image"}:
                written += "<image>"
            case {"text": str(text), **others} if (
                not others
            ):  # as Qwen-VL's own `from_list_format` takes them
                written += text
            case {"image": image, **others} if not others:
                written += f"<img>{_place(image)}</img>"
            case _:
                raise DataError(
                    f'turn {number}: an item of the content is {{"type": "text", "text": ...}}, {{"type": "image", "image": path}} or '
                    f'{{"type": "image_url", "image_url": {{"url": ...}}}}, got {_short(item)}'
                )
    return written


def _pairs(row: Row, prompt: str | None) -> Draft:
    turns = _system(row)
    pairs = _list(row, "conversation")
    for number, pair in enumerate(pairs, 1):
        match pair:
            case {"human": str(question), "assistant": str(answer)}:
                turns += [("user", question), ("assistant", answer)]
            case {"human": str(question)} if number == len(pairs) and pair.get("assistant") is None:
                turns.append(("user", question))
            case _:
                raise DataError(
                    f'`conversation` is a list of {{"human": text, "assistant": text}}, got {_short(pair)} as number {number}'
                )
    return Draft(turns=turns, images=_images(row), objects=_objects(row))


def _query(row: Row, prompt: str | None) -> Draft:
    return _asked(row, _text(row, "query"), "response")


def _instruction(row: Row, prompt: str | None) -> Draft:
    question = _text(row, "instruction")
    if row.get("input") not in (None, ""):
        question += "\n" + _text(row, "input")
    return _asked(row, question, "output")


def _asked(row: Row, question: str, answer_key: str) -> Draft:
    turns = _system(row)
    for pair in _list(row, "history"):
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(text, str) for text in pair)
        ):
            raise DataError(f"`history` is a list of [question, answer], got {_short(pair)} in it")
        turns += [("user", pair[0]), ("assistant", pair[1])]
    turns.append(("user", question))
    if row.get(answer_key) is not None:
        turns.append(("assistant", _text(row, answer_key)))
    return Draft(turns=turns, images=_images(row), objects=_objects(row))


def _continued(key: str, row: Row, prompt: str | None) -> Draft:
    """Plain text to continue: an answer to an empty question, as ms-swift reads it. In the raw template of the base model nothing of the
    question is left, and all of the text is learned."""
    turns: list[tuple[Role, str]] = [("user", ""), ("assistant", _text(row, key))]
    return Draft(turns=_system(row) + turns, images=_images(row), objects=_objects(row))


def _vqa(row: Row, prompt: str | None) -> Draft:
    if row.get("choices") is not None:
        return _choice(row, prompt)
    given = row.get("answer")
    given = (
        _list(row, "answers")
        if row.get("answers") is not None
        else given
        if isinstance(given, list)
        else [given]
    )
    answers = tuple(
        answer.get("answer") if isinstance(answer, dict) else answer
        for answer in given
        if answer is not None
    )
    if not all(isinstance(answer, str) for answer in answers):
        raise DataError(f"answers are text, got {_short(answers)}")
    question = ask(
        prompt or VQA_PROMPT,
        image=f"<img>{_place(row['image'])}</img>",
        question=_text(row, "question"),
    )
    turns: list[tuple[Role, str]] = [("user", "".join(map(str, question)))]
    if answers:
        turns.append(("assistant", Counter(answers).most_common(1)[0][0]))
    return Draft(turns=turns, references=answers)


def _choice(row: Row, prompt: str | None) -> Draft:
    """A row of the jsonl file that Qwen-VL's evaluation has for ScienceQA: `answer` is the number of the right choice, from 0."""
    choices = _list(row, "choices")
    if not 2 <= len(choices) <= len(LETTERS) or not all(
        isinstance(choice, str) for choice in choices
    ):
        raise DataError(f"`choices` is a list of 2 to {len(LETTERS)} texts, got {_short(choices)}")
    hint = row.get("hint") or "N/A"
    options = "\n".join(
        f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)
    )
    asked = {
        "image": f"<img>{_place(row['image'])}</img>",
        "hint": str(hint),
        "question": _text(row, "question"),
        "options": options,
    }
    turns: list[tuple[Role, str]] = [
        ("user", "".join(map(str, ask(prompt or CHOICE_PROMPT, **asked))))
    ]
    if (right := row.get("answer")) is not None:
        if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < len(choices):
            raise DataError(
                f"`answer` is the number of the right choice, 0 to {len(choices) - 1}, got {_short(right)}"
            )
        turns.append(("assistant", LETTERS[right]))
    return Draft(turns=turns, options=tuple(LETTERS[: len(choices)]))


def _referring(row: Row, prompt: str | None) -> Draft:
    """A row of the jsonl files that Qwen-VL's evaluation has for RefCOCO: the box is in pixels, its corners x1, y1, x2, y2."""
    question = ask(
        prompt or REFERRING_PROMPT,
        image=f"<img>{_place(row['image'])}</img>",
        question="<ref-object>",
    )
    thing = {"caption": _text(row, "sent"), "bbox": row["bbox"], "bbox_type": "real"}
    return Draft(
        turns=[("user", "".join(map(str, question))), ("assistant", "<bbox>")], objects=[thing]
    )


LETTERS = "ABCDEFGH"  # of choices
_IMAGES = ("images", "image", "objects")
LAYOUTS = (
    Layout("conversations", ("conversations",), ("system", *_IMAGES), _conversations),
    Layout("messages", ("messages",), ("system", *_IMAGES), _messages),
    Layout("query", ("query",), ("response", "system", "history", *_IMAGES), _query),
    Layout(
        "instruction",
        ("instruction",),
        ("input", "output", "system", "history", *_IMAGES),
        _instruction,
    ),
    Layout("conversation", ("conversation",), ("system", *_IMAGES), _pairs),
    Layout(
        "vqa", ("image", "question"), ("answer", "answers", "question_id", "choices", "hint"), _vqa
    ),
    Layout("referring", ("image", "sent", "bbox"), ("height", "width"), _referring),
)
TEXTS = (  # names that other layouts use, too: they count where no other layout fits
    Layout("text", ("text",), ("system", *_IMAGES), partial(_continued, "text")),
    Layout("response", ("response",), ("system", *_IMAGES), partial(_continued, "response")),
)


def _text(row: Row, key: str) -> str:
    if not isinstance(row[key], str):
        raise DataError(f"`{key}` is text, got {_short(row[key])}")
    return row[key]


def _list(row: Row, key: str) -> list:
    """A list, or one as JSON text, as a cell of a csv file holds it."""
    value = row.get(key)
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as fault:
            raise DataError(
                f"`{key}` is a list, or a list as JSON text; it is not JSON: {fault}"
            ) from None
    if value is not None and not isinstance(value, list):
        raise DataError(f"`{key}` is a list, got {_short(value)}")
    return value or []


def _system(row: Row) -> list[tuple[Role, str]]:
    return [] if row.get("system") is None else [("system", _text(row, "system"))]


def _objects(row: Row) -> list:
    return _list(row, "objects")


def _images(row: Row) -> list[str]:
    """`image` or `images`: a path, a list of paths, or that as JSON text."""
    given = [key for key in ("image", "images") if row.get(key) is not None]
    if len(given) == 2:
        raise DataError("give either `image` or `images`, not both")
    images = row[given[0]] if given else []
    if isinstance(images, str) and images.lstrip().startswith(("[", "{")):
        with suppress(ValueError):  # a path may begin so
            images = parse_json(images)
    return [_place(image) for image in (images if isinstance(images, list) else [images])]


def _place(image: Any) -> str:
    match image:
        case str(place) | {"path": str(place)} | {"url": str(place)}:
            return place
    raise DataError(f"an image is a path, an address or base64 text, got {_short(image)}")


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_short = _SHORT.repr  # stops at some depth, too
