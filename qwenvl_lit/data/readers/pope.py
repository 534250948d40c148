"""POPE: questions whether an object is in an image of COCO, answered with yes or no."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwenvl_lit.data.readers.files import RowFile, list_names
from qwenvl_lit.data.readers.prompts import VQA_PROMPT, fill_prompt
from qwenvl_lit.data.readers.rows import DEFAULT, ReadOptions, image_from
from qwenvl_lit.data.readers.sources import open_source
from qwenvl_lit.types import Conversation, DataError, Turn

KEYS = ("question_id", "image", "text", "label")


def read_pope(
    source: str, read_options: ReadOptions = DEFAULT, *, images: str
) -> Sequence[Conversation]:
    """Returns the questions of one of POPE's files, such as `coco_pope_random.json`.

    Args:
        source: a file with one JSON object a line, {question_id, image, text, label}, as in
            `read_rows`.
        images: the folder of the images within `read_options.root`.
    """
    return open_source(
        source, read_options, lambda file: ObjectQuestions(file, read_options, images=images)
    )


class ObjectQuestions(Sequence[Conversation]):
    """The questions of one file. The `question_id` is the row's id.

    Raises:
        DataError: see `RowFile`. Fetching a row raises it if a key is missing or has another value,
            or if the image does not exist.
    """

    def __init__(self, file: Path, read_options: ReadOptions = DEFAULT, *, images: str):
        self.file = file
        self.images = images
        self.read_options = read_options
        self._prompt = read_options.prompt or VQA_PROMPT
        fill_prompt(self._prompt, image="", question="")  # check it now
        self._rows = RowFile(file, read_options.cache)
        _ = self[0]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Conversation:
        index = range(len(self))[index]
        row, where = self._rows[index], self._rows.where(index)
        try:
            question_id, name, text, label = [_text_of(row, key) for key in KEYS]
            if label not in ("yes", "no"):
                raise DataError(f"label must be yes or no, got {label!r:.50}")
            root = self.read_options.root or self.file.parent
            image = image_from(f"{self.images}/{name}", root, self.read_options)
            parts = fill_prompt(self._prompt, image=image, question=text)
        except DataError as error:
            raise error.in_row(where) from None
        turns = (Turn(role="user", parts=parts), Turn(role="assistant", parts=(label,)))
        columns = {"label": label}
        return Conversation(id=question_id, turns=turns, columns=columns, index=index, where=where)


def _text_of(row: dict, key: str) -> str:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(
            f"{key} must be text, got {value!r:.50}; the row has the keys "
            f"{list_names(list(row))}, and POPE's rows have {', '.join(KEYS)}"
        )
    return str(value)
