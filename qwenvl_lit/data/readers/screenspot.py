"""ScreenSpot: the question is an instruction for a screenshot, the answer the box of an element."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenvl_lit.data.readers.coco import check_needs
from qwenvl_lit.data.readers.drafts import Draft, ImageReference, Placeholder, PlainText
from qwenvl_lit.data.readers.files import RowFile
from qwenvl_lit.data.readers.keys import short
from qwenvl_lit.data.readers.prompts import fill_prompt
from qwenvl_lit.data.readers.rows import DEFAULT, ReadOptions, conversation_from
from qwenvl_lit.data.readers.sources import open_source
from qwenvl_lit.models.unit_text import FIND_PROMPTS
from qwenvl_lit.types import Conversation, DataError

TEXTS = ("img_filename", "instruction", "data_type", "data_source")


def check_screenspot(root: str | Path, download: bool = True) -> None:
    """Raises a DataError unless `root` holds ScreenSpot, which users download themselves."""
    check_needs(root, ["screenspot"])


def read_screenspot(
    source: str, read_options: ReadOptions = DEFAULT, *, images: str
) -> Sequence[Conversation]:
    """Returns the rows of a published json file, all of them or those of a type of element.

    Args:
        source: a file, as in `read_rows`; `:text` or `:icon` behind its name takes the rows with
            this `data_type`.
        images: folder of the screenshots within `read_options.root`.
    """
    match = re.fullmatch(r"(.*\.json)(?::(\w+))?(#\d+)?", source, re.DOTALL)
    if match is None:
        raise DataError(f"{source} must be FILE.json, FILE.json:text or FILE.json:icon")
    file, data_type, count = match.groups()
    return open_source(
        file + (count or ""),
        read_options,
        lambda path: Instructions(path, data_type, read_options, images=images),
    )


class Instructions(Sequence[Conversation]):
    """The rows of one file. `data_type` and `data_source` are columns.

    Raises:
        DataError: the file is not in the published format or has no such rows, or the image or box
            of a row cannot be used.
    """

    def __init__(
        self,
        file: Path,
        data_type: str | None,
        read_options: ReadOptions = DEFAULT,
        *,
        images: str,
    ):
        self.file = file
        self.read_options = read_options
        self.images = images
        self._prompt = read_options.prompt or FIND_PROMPTS["unit_points"]
        fill_prompt(self._prompt, image="", question="")  # check it now
        self._rows = RowFile(file, read_options.cache)
        types = [_checked(self._rows, index)["data_type"] for index in range(len(self._rows))]
        wanted = set(types) if data_type is None else {data_type}
        self._indices = [index for index, found in enumerate(types) if found in wanted]
        if not self._indices:
            raise DataError(
                f"{file} has no rows of data_type {data_type!r}; it has "
                f"{', '.join(sorted(set(types)))}"
            )

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Conversation:
        index = range(len(self))[index]
        line = self._indices[index]
        row = _checked(self._rows, line)
        where, row_id = self._rows.where(line), self._rows.name_of(line)
        try:
            return conversation_from(
                self._draft(row),
                row_id=row_id,
                root=self.read_options.root or self.file.parent,
                index=index,
                columns={key: row[key] for key in ("data_type", "data_source")},
                where=where,
                read_options=self.read_options,
            )
        except DataError as error:
            raise error.in_row(where, row_id) from None

    def _draft(self, row: Mapping[str, Any]) -> Draft:
        x, y, width, height = row["bbox"]
        question = fill_prompt(
            self._prompt,
            image=ImageReference(f"{self.images}/{row['img_filename']}"),
            question=PlainText(row["instruction"]),
        )
        box = {"caption": None, "bbox": [x, y, x + width, y + height], "bbox_type": "real"}
        turns = [("user", question), ("assistant", [Placeholder.BOXES])]
        return Draft(turns=turns, objects=[box])


def _checked(rows: RowFile, index: int) -> dict[str, Any]:
    """Returns a row, if it is in the published format."""
    row = rows[index]
    box = row.get("bbox")
    is_box = isinstance(box, list) and len(box) == 4
    if is_box:
        is_box = all(type(value) in (int, float) for value in box)
    wrong = [key for key in TEXTS if not isinstance(row.get(key), str)]
    if not is_box:
        wrong.append("bbox")
    if wrong:
        found = {key: row.get(key) for key in wrong}
        raise DataError(
            f"is not in ScreenSpot's published format: expected texts {', '.join(TEXTS)} and "
            f"`bbox` as [x, y, width, height] in pixels, got {short(found)}"
        ).in_row(rows.where(index))
    return row
