"""Rows of parquet files, with images as bytes in their cells."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_lit.data.readers.columns import ImageColumn, json_value
from qwenvl_lit.data.readers.files import check_is_file, file_version
from qwenvl_lit.data.readers.formats import check_is_read
from qwenvl_lit.data.readers.row_groups import (
    columns_read,
    group_ends,
    image_in,
    list_length,
    text_of_row,
    unpacked,
)
from qwenvl_lit.extras import missing
from qwenvl_lit.types import DataError

MAGIC = b"PAR1"  # first and last bytes of a file


def is_parquet(file: Path) -> bool:
    """Tells whether a file is parquet by its name or its first bytes.

    Raises:
        DataError: it is not a file that can be read.
    """
    check_is_file(file)
    if file.suffix.lower() == ".parquet":
        return True
    with file.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


class ParquetRows(Sequence[dict[str, Any]]):
    """The rows of a parquet file as the rows of a JSON file would be.

    Structs are dicts without their nulls; dates, times and decimals are text. A cell with the bytes
    of images holds `CellImage`s, which read them when they are needed.

    Args:
        cache: folder in which row groups are unpacked, see `row_groups`.

    Raises:
        DataError: pyarrow is not installed, the file cannot be read, is not what its name says, or
            has no rows. Fetching a row raises it for that row.
    """

    def __init__(self, file: Path, cache: Path | None = None):
        self.file = file
        _check(file)
        self._source = unpacked(file, file_version(file), cache)
        self._ends = group_ends(self._source)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def where(self, index: int) -> str:
        """Returns file, row and row group of a row; both are counted from 1."""
        group = int(np.searchsorted(self._ends, index, side="right"))
        return f"{self.file} (row {index + 1}, row group {group + 1})"

    def name_of(self, index: int) -> str:
        """Returns a name for a row that has no id: the file and the number of the row."""
        return f"{self.file.name}:{index + 1}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        try:
            cells = text_of_row(self._source, index)
            row = {name: json_value(cell) for name, cell in cells.items()}
            for column in columns_read(self._source).images:
                row[column.name] = self._cell(column, index, row.get(column.name))
        except DataError as error:
            raise error.in_row(self.where(index)) from None
        return row

    def _cell(self, column: ImageColumn, index: int, text: Any) -> Any:
        """Returns what a cell with images holds.

        Args:
            text: the cell without the bytes of its images, if the column has more than those.
        """
        if not column.is_list:
            return self._image(column, index, None, text)
        if column.has_text:
            length = None if text is None else len(text)
        else:
            length = list_length(self._source, column, index)
        if length is None:
            return None
        entries = text or [None] * length
        return [self._image(column, index, k, entry) for k, entry in enumerate(entries)]

    def _image(self, column: ImageColumn, index: int, position: int | None, text: Any) -> Any:
        """Returns one image: its bytes, a struct of them and the path, the path, or None."""
        if column.has_text and text is None:
            return None
        label = ""
        if column.has_text and isinstance(text.get("path"), str):
            label = text["path"]
        content = image_in(self._source, column, index, position, label)
        if content is None:
            return text or None
        if column.is_struct:
            return {**(text or {}), "bytes": content}
        return content


def _check(file: Path) -> None:
    """Checks what can be checked before the rows are read.

    Raises:
        DataError: see `ParquetRows`.
    """
    if find_spec("pyarrow") is None:
        raise DataError(missing("pyarrow", str(file)))
    with file.open("rb") as stream:
        start = stream.read(64)
        stream.seek(max(0, file.stat().st_size - len(MAGIC)))
        end = stream.read()
    if not start:
        raise DataError(f"{file} is empty; expected a parquet file")
    if not start.startswith(MAGIC):
        check_is_read(file, start)
        raise DataError(
            f"{file} is not a parquet file: it begins with {start[:16]!r}; fetch or write it again"
        )
    if end != MAGIC:
        raise DataError(
            f"{file} is not a complete parquet file: its end is missing; fetch or write it again"
        )
