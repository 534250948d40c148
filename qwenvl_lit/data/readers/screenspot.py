"""ScreenSpot: the question is an instruction for a screenshot, the answer the box of an element."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from qwenvl_lit.data.readers.coco import check_needs
from qwenvl_lit.data.readers.drafts import Draft, ImageReference, Placeholder, PlainText
from qwenvl_lit.data.readers.files import RowFile
from qwenvl_lit.data.readers.keys import image_of, short
from qwenvl_lit.data.readers.parquet import ParquetRows
from qwenvl_lit.data.readers.prompts import fill_prompt
from qwenvl_lit.data.readers.rows import DEFAULT, ReadOptions, conversation_from
from qwenvl_lit.data.readers.sources import files_of, open_source
from qwenvl_lit.data.selection import parse_count, take
from qwenvl_lit.models.unit_text import FIND_PROMPTS
from qwenvl_lit.types import Conversation, DataError

TEXTS = ("img_filename", "instruction", "data_type", "data_source")
TEXT_COLUMNS = ("file_name", *TEXTS[1:])  # of rootsautomation/ScreenSpot
PLATFORMS = {  # data_source -> what the published file of its rows is named by
    **dict.fromkeys(("ios", "android"), "mobile"),
    **dict.fromkeys(("macos", "windows"), "desktop"),
    **dict.fromkeys(("tool", "shop", "gitlab", "forum"), "web"),
}


class Instruction(NamedTuple):
    image: ImageReference
    text: str
    bbox: list[float]  # [x0, y0, x1, y1]
    bbox_type: str  # "real": pixels, "norm_1": fractions of the image
    data_type: str
    data_source: str
    where: str
    row_id: str


def check_screenspot(root: str | Path, download: bool = True, parquet: str | None = None) -> None:
    """Raises a DataError unless `root` holds ScreenSpot, which users download themselves.

    Args:
        parquet: read in place of these files, see `read_screenspot`.
    """
    if parquet is None:
        check_needs(root, ["screenspot"])


def read_screenspot(
    source: str, read_options: ReadOptions = DEFAULT, *, images: str, parquet: str | None = None
) -> Sequence[Conversation]:
    """Returns the rows of a published json file, all of them or those of a type of element.

    Args:
        source: a file, as in `read_rows`; `:text` or `:icon` behind its name takes the rows with
            this `data_type`.
        images: folder of the screenshots within `read_options.root`.
        parquet: files, a glob or an address of the hub with the rows of all json files, in the
            columns of rootsautomation/ScreenSpot: `image`, `bbox` in fractions of the image, and
            `TEXT_COLUMNS`. Of `source`, only the platform in its name then counts.

    Raises:
        DataError: the file is not in the published format or has no such rows. Fetching a row
            raises it if its image or box cannot be used.
    """
    match = re.fullmatch(r"(.*\.json)(?::(\w+))?(#\d+)?", source, re.DOTALL)
    if match is None:
        raise DataError(f"{source} must be FILE.json, FILE.json:text or FILE.json:icon")
    file, data_type, count = match.groups()
    if parquet is None:
        return open_source(
            file + (count or ""),
            read_options,
            lambda path: Instructions(
                _of_type(_instructions_in_json(path, images, read_options), data_type, path),
                read_options.root or path.parent,
                read_options,
            ),
        )
    files = tuple(files_of(os.path.expanduser(parquet), read_options))
    platform = Path(file).stem.rpartition("_")[2]
    found = []
    for row in _instructions_in_parquet(files, read_options.cache):
        if PLATFORMS[row.data_source] == platform:
            found.append(row)
    if not found:
        raise DataError(
            f"{parquet} has no rows for {source}; name one of screenspot_mobile.json, "
            f"screenspot_desktop.json and screenspot_web.json"
        )
    rows = Instructions(_of_type(found, data_type, parquet), files[0].parent, read_options)
    number = parse_count(source)[1]
    if number is None:
        return rows
    return take(rows, number, read_options.seed)


class Instructions(Sequence[Conversation]):
    """Rows of ScreenSpot. `data_type` and `data_source` are columns.

    Args:
        root: folder of relative paths of images.
    """

    def __init__(
        self, rows: Sequence[Instruction], root: Path, read_options: ReadOptions = DEFAULT
    ):
        self.root = root
        self.read_options = read_options
        self._prompt = read_options.prompt or FIND_PROMPTS["unit_points"]
        fill_prompt(self._prompt, image="", question="")  # check it now
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Conversation:
        index = range(len(self))[index]
        row = self._rows[index]
        question = fill_prompt(self._prompt, image=row.image, question=PlainText(row.text))
        box = {"caption": None, "bbox": row.bbox, "bbox_type": row.bbox_type}
        turns = [("user", question), ("assistant", [Placeholder.BOXES])]
        try:
            return conversation_from(
                Draft(turns=turns, objects=[box]),
                row_id=row.row_id,
                root=self.root,
                index=index,
                columns={"data_type": row.data_type, "data_source": row.data_source},
                where=row.where,
                read_options=self.read_options,
            )
        except DataError as error:
            raise error.in_row(row.where, row.row_id) from None


def _of_type(
    rows: Sequence[Instruction], data_type: str | None, source: object
) -> Sequence[Instruction]:
    """Returns the rows with this `data_type`; all rows if it is None.

    Raises:
        DataError: there are none; names `source`.
    """
    found = [row for row in rows if data_type in (None, row.data_type)]
    if not found:
        types = sorted({row.data_type for row in rows})
        raise DataError(
            f"{source} has no rows of data_type {data_type!r}; it has {', '.join(types)}"
        )
    return found


def _instructions_in_json(file: Path, images: str, read_options: ReadOptions) -> list[Instruction]:
    rows = RowFile(file, read_options.cache)
    expected = f"texts {', '.join(TEXTS)} and `bbox` as [x, y, width, height] in pixels"
    found = []
    for index, row in enumerate(rows):
        where = rows.where(index)
        _check(row, TEXTS, where, expected)
        x, y, width, height = row["bbox"]
        image = ImageReference(f"{images}/{row['img_filename']}")
        box = [x, y, x + width, y + height]
        text, data_type, source = (row[key] for key in TEXTS[1:])
        name = rows.name_of(index)
        found.append(Instruction(image, text, box, "real", data_type, source, where, name))
    return found


@lru_cache(maxsize=1)  # the test sets are opened one after the other
def _instructions_in_parquet(files: tuple[Path, ...], cache: Path | None) -> Sequence[Instruction]:
    expected = (
        f"image, texts {', '.join(TEXT_COLUMNS)} and `bbox` as [x0, y0, x1, y1] in fractions of "
        f"the image; data_source is one of {', '.join(PLATFORMS)}"
    )
    found = []
    for file in files:
        rows = ParquetRows(file, cache)
        for index, row in enumerate(rows):
            where = rows.where(index)
            _check(row, TEXT_COLUMNS, where, expected)
            text, data_type, source = (row[key] for key in TEXT_COLUMNS[1:])
            image, name = image_of(row["image"]), rows.name_of(index)
            if source not in PLATFORMS or max(row["bbox"]) > 2:  # pixels are far more
                raise _wrong_format(row, ("bbox", "data_source"), where, expected)
            found.append(
                Instruction(image, text, row["bbox"], "norm_1", data_type, source, where, name)
            )
    return found


def _check(row: Mapping[str, Any], texts: Sequence[str], where: str, expected: str) -> None:
    """Raises a DataError unless a row has these texts, an image and a box of four numbers."""
    box = row.get("bbox")
    is_box = isinstance(box, list) and len(box) == 4
    if is_box:
        is_box = all(type(value) in (int, float) for value in box)
    wrong = [key for key in texts if not isinstance(row.get(key), str)]
    if not is_box:
        wrong.append("bbox")
    if texts == TEXT_COLUMNS and row.get("image") is None:
        wrong.append("image")
    if wrong:
        raise _wrong_format(row, wrong, where, expected)


def _wrong_format(
    row: Mapping[str, Any], keys: Sequence[str], where: str, expected: str
) -> DataError:
    found = {key: row.get(key) for key in keys}
    return DataError(
        f"is not in ScreenSpot's published format: expected {expected}, got {short(found)}"
    ).in_row(where)
