"""The layouts of rows: a table from the keys of a row to the function that reads it.

A new layout is one more entry of `LAYOUTS`, or of `TEXT_LAYOUTS` if other layouts may have its keys
too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any

from qwenvl_lit.data.readers.answers import (
    accepted_answers,
    answers_of,
    most_frequent,
    right_choice,
)
from qwenvl_lit.data.readers.drafts import (
    Draft,
    DraftPart,
    DraftTurn,
    ImageReference,
    Placeholder,
)
from qwenvl_lit.data.readers.files import list_names, parse_json
from qwenvl_lit.data.readers.keys import (
    Row,
    check_all_is_read,
    check_turn_is_read,
    check_type_is_read,
    image_of,
    images_of,
    list_of,
    objects_of,
    records_of,
    short,
    system_turns,
    text_of,
)
from qwenvl_lit.data.readers.prompts import CHOICE_PROMPT, REFERRING_PROMPT, VQA_PROMPT, fill_prompt
from qwenvl_lit.data.readers.spelling import did_you_mean, is_same, meant
from qwenvl_lit.data.readers.unread_images import image_columns
from qwenvl_lit.types import DataError, Role

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to write a row."""

    name: str
    required: tuple[str, ...]  # a row with these keys has this layout
    optional: tuple[str, ...]  # further keys that `draft` reads
    draft: Callable[[Row, str | None], Draft]

    def read(self, row: Row, prompt: str | None) -> Draft:
        """Returns the draft of a row.

        Args:
            prompt: used by layouts whose rows hold no complete question; None: the prompt of
                Qwen-VL's published evaluation.

        Raises:
            DataError: the row has another layout, or a key has a value of the wrong type.
        """
        actual = layout_of(row).name
        if actual != self.name:
            raise DataError(
                f"is in the layout `{actual}`, but the first row of the file is in `{self.name}`; "
                f"its keys are {list_names(list(row))}. Put each layout in its own file"
            )
        check_all_is_read(row)
        notes = tuple(self._misspelled_keys(row))
        image_notes = image_columns(row, {*self.required, *self.optional})
        draft = self.draft(row, prompt)
        if not notes and not image_notes:
            return draft
        return replace(draft, notes=notes, notes_without_image=image_notes)

    def _misspelled_keys(self, row: Row) -> Iterator[str]:
        """Yields notes about keys that are nearly keys of this layout. They may be columns.

        Raises:
            DataError: a key differs from one that is read only in case, blanks and the like.
        """
        known = ("id", *self.required, *self.optional)
        unread = row.keys() - known
        if not unread:
            return
        for key in sorted(unread):
            near = meant(key, known) or _other_name(key, known)
            if near is None or row[key] is None or row.get(near) is not None:
                continue
            if near != "id" and is_same(key, near):
                raise DataError(
                    f"the key {short(key)} is not read; did you mean `{near}`? Rename it, also if "
                    f"it is a column of your own"
                )
            yield f"the key {short(key)} is not read; did you mean `{near}`?"

    def columns(self, row: Row) -> dict[str, str]:
        """Returns the text and numbers under keys that the layout does not read, as text."""
        known = {"id", *self.required, *self.optional}
        columns = {}
        for key, value in row.items():
            if key not in known and isinstance(value, str | int | float):
                columns[key] = str(value)
        return columns


def _other_name(key: str, known: Sequence[str]) -> str | None:
    """Returns the key that is read in place of `key`, which other datasets and stacks have."""
    name = _OTHER_NAMES.get(key)
    return name if name in known else None


def layout_of(row: Row) -> Layout:
    """Returns the layout that the keys of `row` belong to. Keys with the value null do not count.

    Raises:
        DataError: `row` has no known layout, or several.
    """
    keys = {key for key, value in row.items() if value is not None}
    matching: list[Layout] = []
    for layouts in (LAYOUTS, TEXT_LAYOUTS):
        matching = [layout for layout in layouts if keys.issuperset(layout.required)]
        if len(matching) == 1:
            return matching[0]
        if matching:
            break
    if not matching:
        _check_required_keys(row)
    fit = "no known layout"
    if matching:
        fit = f"several layouts ({', '.join(layout.name for layout in matching)})"
    known = [
        f"{' + '.join(layout.required)} [{', '.join(layout.optional)}]"
        for layout in LAYOUTS + TEXT_LAYOUTS
    ]
    raise DataError(
        f"keys {list_names(list(row))} fit {fit}. Known, optional keys in brackets: "
        f"{'; '.join(known)}"
    )


def _check_required_keys(row: Row) -> None:
    """Raises an error if `row` lacks only a value of a layout, or its keys are nearly known.

    Raises:
        DataError: names the key.
    """
    for layouts in (LAYOUTS, TEXT_LAYOUTS):
        present = [layout for layout in layouts if set(layout.required) <= row.keys()]
        if len(present) == 1:
            empty = [key for key in present[0].required if row[key] is None]
            raise DataError(
                f"`{'`, `'.join(empty)}` has no value, and the layout `{present[0].name}` needs "
                f"one; give it a value, or remove the row"
            )
    if len(row) == 1 and len(_SEPARATORS.split(*row)) > 1:
        raise DataError(
            f"the only key is {short(*row)}; if it is the header of a table, separate the cells "
            f"by commas in a csv file, by tabs in a tsv file"
        )
    required = [key for layout in LAYOUTS + TEXT_LAYOUTS for key in layout.required]
    absent = tuple(key for key in required if key not in row)
    for key in row:
        if key not in required and (near := meant(key, absent)):
            raise DataError(f"the key {short(key)} is not known; did you mean `{near}`?")


def id_of(row: Row) -> str | None:
    """Returns the id that a row gives itself, if it does.

    Raises:
        DataError: the id is neither text nor a number.
    """
    row_id = row.get("id")
    if row_id is None:
        row_id = row.get("question_id")
    if row_id is None:
        return None
    if not isinstance(row_id, str | int | float) or isinstance(row_id, bool):
        raise DataError(f"an id must be text or a number, got {short(row_id)}")
    return str(row_id)


def _conversations(row: Row, prompt: str | None) -> Draft:
    """Reads ShareGPT's layout, in which Qwen-VL's own training data are written."""
    return _chat(row, records_of(row, "conversations"))


def _messages(row: Row, prompt: str | None) -> Draft:
    """Reads the messages of OpenAI's chat API."""
    return _chat(row, records_of(row, "messages"))


def _chat(row: Row, entries: Sequence[Any]) -> Draft:
    turns = system_turns(row)
    for number, entry in enumerate(entries, 1):
        role = content = None
        if isinstance(entry, dict):
            role = entry.get("from", entry.get("role"))
            content = entry.get("value", entry.get("content"))
        if not isinstance(role, str) or role not in ROLES or not isinstance(content, str | list):
            raise DataError(f"turn {number} {_turn_problem(entry, role, content)}")
        parts = [content] if isinstance(content, str) else _content(number, content)
        if ROLES[role] == "assistant":
            check_turn_is_read(number, entry)
        turns.append((ROLES[role], parts))
    return _chat_draft(row, turns)


def _turn_problem(entry: Any, role: Any, content: Any) -> str:
    if not isinstance(entry, dict) or (role is None and content is None):
        is_pair = isinstance(entry, dict) and "human" in entry
        hint = "; did you mean the key `conversation`?" if is_pair else ""
        return (
            f'must be {{"from": role, "value": text}} or {{"role": role, "content": text}}, got '
            f"{short(entry)}{hint}"
        )
    if not isinstance(role, str) or role not in ROLES:
        found = "no role" if role is None else f"the role {short(role)}"
        return f"has {found}; it must be one of {', '.join(ROLES)}{did_you_mean(role, ROLES)}"
    found = "no content" if content is None else f"the content {short(content)}"
    return f"has {found}; it must be text, or a list of texts and images"


def _chat_draft(row: Row, turns: list[DraftTurn]) -> Draft:
    """Returns the draft of a chat, whose last answer may have further accepted ones in `answers`.

    Without a last answer, it is the most frequent one of `answers`.
    """
    accepted = accepted_answers(row)
    if accepted and turns and turns[-1][0] == "user":
        turns.append(("assistant", [most_frequent(accepted)]))
    elif accepted and turns:
        texts = [part for part in turns[-1][1] if isinstance(part, str)]
        if (last := "".join(texts)) not in accepted:
            accepted = (last, *accepted)
    return Draft(turns=turns, images=images_of(row), objects=objects_of(row), references=accepted)


def _content(number: int, items: Sequence[Any]) -> list[DraftPart]:
    """Reads the content of a turn. `{"type": "image"}` alone stands for the next of `images`."""
    parts: list[DraftPart] = []
    for item, following in zip_longest(items, items[1:]):
        if isinstance(item, str) and isinstance(following, str):
            raise DataError(
                f"turn {number} has two texts in a row, {short(item)} and {short(following)}; "
                f"write them as one. Several accepted answers belong in the row's key `answers`"
            )
        if isinstance(item, dict):
            # Tools that store items as a table fill up missing keys with null.
            item = {key: value for key, value in item.items() if value is not None}
            check_type_is_read(number, item)
        match item:
            case str(text) | {"type": "text", "text": str(text)}:
                parts.append(text)
            case (
                {"type": "image_url", "image_url": image}
                | {"type": "image", "image": image}
                | {"type": "image", "path": image}
                | {"type": "image", "url": image}
            ):
                parts.append(image_of(image))
            case {"type": "image"}:
                parts.append(Placeholder.IMAGE)
            # The next two are accepted by `from_list_format` of Qwen-VL's own tokenizer.
            case {"text": str(text), **others} if not others:
                parts.append(text)
            case {"image": image, **others} if not others:
                parts.append(image_of(image))
            case _:
                raise DataError(
                    f'turn {number}: an item of the content must be {{"type": "text", "text": ...}}'
                    f', {{"type": "image", "image": path}} or '
                    f'{{"type": "image_url", "image_url": {{"url": ...}}}}, got {short(item)}'
                )
    return parts


def _pairs(row: Row, prompt: str | None) -> Draft:
    turns = system_turns(row)
    pairs = records_of(row, "conversation")
    for number, pair in enumerate(pairs, 1):
        match pair:
            case {"human": str(question), "assistant": str(answer)}:
                turns += [("user", [question]), ("assistant", [answer])]
            case {"human": str(question)} if number == len(pairs) and pair.get("assistant") is None:
                turns.append(("user", [question]))
            case _:
                is_turn = isinstance(pair, dict) and ("from" in pair or "role" in pair)
                hint = "; did you mean the key `conversations`?" if is_turn else ""
                raise DataError(
                    f'`conversation` must be a list of {{"human": text, "assistant": text}}, got '
                    f"{short(pair)} as number {number}{hint}"
                )
    return _chat_draft(row, turns)


def _query(row: Row, prompt: str | None) -> Draft:
    """Reads ms-swift's layout."""
    return _question_after_history(row, text_of(row, "query"), "response")


def _instruction(row: Row, prompt: str | None) -> Draft:
    """Reads Alpaca's layout."""
    question = text_of(row, "instruction")
    if row.get("input") not in (None, ""):
        question += "\n" + text_of(row, "input")
    return _question_after_history(row, question, "output")


def _question_after_history(row: Row, question: str, answer_key: str) -> Draft:
    turns = system_turns(row)
    for pair in list_of(row, "history"):
        match pair:
            case [str(earlier_question), str(earlier_answer)]:
                turns += [("user", [earlier_question]), ("assistant", [earlier_answer])]
            case _:
                raise DataError(
                    f"`history` must be a list of [question, answer], got {short(pair)} in it"
                )
    turns.append(("user", [question]))
    if row.get(answer_key) is not None:
        turns.append(("assistant", [text_of(row, answer_key)]))
    return _chat_draft(row, turns)


def _plain_text(key: str, row: Row, prompt: str | None) -> Draft:
    """Reads text to continue. As in ms-swift, it becomes the answer to an empty question.

    In the raw template of the base model the question then leaves no tokens, and all of the text is
    supervised.
    """
    turns = [*system_turns(row), ("user", []), ("assistant", [text_of(row, key)])]
    return Draft(turns=turns, images=images_of(row), objects=objects_of(row))


def _vqa(row: Row, prompt: str | None) -> Draft:
    """Reads a question about an image. The most frequent of its answers is supervised."""
    if row.get("choices") is not None:
        return _choice(row, prompt)
    answers = answers_of(row)
    question = fill_prompt(
        prompt or VQA_PROMPT, image=image_of(row["image"]), question=text_of(row, "question")
    )
    turns: list[DraftTurn] = [("user", question)]
    if answers:
        turns.append(("assistant", [most_frequent(answers)]))
    return Draft(turns=turns, references=answers)


def _choice(row: Row, prompt: str | None) -> Draft:
    """Reads a row of Qwen-VL's evaluation file for ScienceQA.

    `answer` is the index of the right choice, counted from 0. A cell of a table is text.
    """
    choices = list_of(row, "choices")
    all_texts = all(isinstance(choice, str) for choice in choices)
    if not 2 <= len(choices) <= len(LETTERS) or not all_texts:
        raise DataError(
            f"`choices` must be a list of 2 to {len(LETTERS)} texts, got {short(choices)}"
        )
    letters = LETTERS[: len(choices)]
    options = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
    question = fill_prompt(
        prompt or CHOICE_PROMPT,
        image=image_of(row["image"]),
        hint=str(row.get("hint") or "N/A"),
        question=text_of(row, "question"),
        options="\n".join(options),
    )
    turns: list[DraftTurn] = [("user", question)]
    if row.get("answer") is not None:
        turns.append(("assistant", [letters[right_choice(row["answer"], choices)]]))
    return Draft(turns=turns, options=tuple(letters))


def _referring(row: Row, prompt: str | None) -> Draft:
    """Reads a row of Qwen-VL's evaluation files for RefCOCO. The box is in pixels."""
    image = image_of(row["image"])
    bbox = row["bbox"]
    if isinstance(bbox, str):
        with suppress(ValueError):  # `BoxReader` refuses or drops what is no box
            bbox = parse_json(bbox)
    return referring_draft(image, text_of(row, "sent"), bbox, prompt)


def referring_draft(image: ImageReference, phrase: str, bbox: Any, prompt: str | None) -> Draft:
    """Returns a draft whose question is `phrase` and whose answer is a box.

    Args:
        phrase: becomes a label and is not searched for markup.
        bbox: [x1, y1, x2, y2] in pixels.
        prompt: as in `Layout.read`.
    """
    question = fill_prompt(prompt or REFERRING_PROMPT, image=image, question=Placeholder.LABEL)
    return Draft(
        turns=[("user", question), ("assistant", [Placeholder.BOXES])],
        objects=[{"caption": phrase, "bbox": bbox, "bbox_type": "real"}],
    )


_OTHER_NAMES = {"references": "answers", "reference": "answers"}
_SEPARATORS = re.compile(r"[,;|\t]")
LETTERS = "ABCDEFGH"  # names of choices
_IMAGES = ("images", "image", "objects")
_CHAT = ("system", "answers", *_IMAGES)
_HISTORY = ("history", *_CHAT)
_VQA = ("answer", "answers", "question_id", "choices", "hint")
LAYOUTS = (
    Layout("conversations", ("conversations",), _CHAT, _conversations),  # ShareGPT
    Layout("messages", ("messages",), _CHAT, _messages),  # OpenAI
    Layout("query", ("query",), ("response", *_HISTORY), _query),  # ms-swift
    Layout("instruction", ("instruction",), ("input", "output", *_HISTORY), _instruction),  # Alpaca
    Layout("conversation", ("conversation",), _CHAT, _pairs),
    Layout("vqa", ("image", "question"), _VQA, _vqa),
    Layout("referring", ("image", "sent", "bbox"), ("height", "width"), _referring),
)
# Tried only if no layout above matches, because other layouts may have these keys too.
TEXT_LAYOUTS = (
    Layout("text", ("text",), ("system", *_IMAGES), partial(_plain_text, "text")),
    Layout("response", ("response",), ("system", *_IMAGES), partial(_plain_text, "response")),
)
