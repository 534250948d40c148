"""Files as sequences of conversations.

A row is parsed when it is fetched. Every error names its file, line and row id.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from qwenvl_lit.data.readers.files import RowFile
from qwenvl_lit.data.readers.keys import without_empty_texts
from qwenvl_lit.data.readers.layouts import id_of, layout_of
from qwenvl_lit.data.readers.parquet import ParquetRows, is_parquet
from qwenvl_lit.data.readers.rows import DEFAULT, ReadOptions, conversation_from
from qwenvl_lit.data.selection import Concat, parse_count, take
from qwenvl_lit.types import Conversation, DataError

HUB = "hf://"  # begins the address of a dataset of the Hugging Face hub


def read_rows(source: str, read_options: ReadOptions = DEFAULT) -> Sequence[Conversation]:
    """Returns the rows of parquet files, or of json, jsonl, csv or tsv files, possibly as `.gz`.

    A file may have any layout of `data/readers/layouts.py`, the same for all its rows.

    Args:
        source: a path or a glob, or a dataset of the Hugging Face hub (see `hub_files`); `#N` at
            its end takes N of the rows (see `take`).

    Raises:
        DataError: there is no such file, or its first row has no known layout.
    """
    return open_source(source, read_options, lambda file: FileRows(file, read_options))


def open_source(
    source: str, read_options: ReadOptions, read: Callable[[Path], Sequence[Conversation]]
) -> Sequence[Conversation]:
    """Returns the rows that `read` finds in the files of `source` (see `read_rows`).

    Raises:
        DataError: there is no such file.
    """
    pattern, count = parse_count(os.path.expanduser(source))
    by_file = [read(file) for file in files_of(pattern, read_options)]
    rows = by_file[0] if len(by_file) == 1 else Concat(by_file)
    if count is None:
        return rows
    return take(rows, count, read_options.seed)


def files_of(pattern: str, read_options: ReadOptions) -> list[Path]:
    """Returns the files that a path, a glob or an address of the hub names.

    Raises:
        DataError: there is none.
    """
    if pattern.startswith(HUB):
        from qwenvl_lit.data.download.hub import hub_files

        return hub_files(pattern, read_options.download)
    patterns = [pattern]
    if read_options.root is not None:
        patterns.insert(0, str(read_options.root / pattern))
    files = next(filter(None, map(_matching_files, patterns)), [])
    if not files:
        raise DataError(
            f"no file {' or '.join(patterns)}, relative to {Path.cwd()}; check the path and "
            f"`data.root`"
        )
    return list(map(Path, files))


def _matching_files(pattern: str) -> list[str]:
    if os.path.exists(pattern):  # a name with characters that a glob would interpret
        return [pattern]
    return sorted(glob.glob(pattern, recursive=True))


class FileRows(Sequence[Conversation]):
    """The rows of one file. All have the layout of the first one, `layout`.

    Raises:
        DataError: see `RowFile` and `ParquetRows`; or the first row has no known layout. Fetching
            a row raises DataError or `Dropped`.
    """

    def __init__(self, file: Path, read_options: ReadOptions = DEFAULT):
        self.file = file
        self.read_options = read_options
        reader = ParquetRows if is_parquet(file) else RowFile
        self._rows = reader(file, read_options.cache)
        first = without_empty_texts(self._rows[0])
        try:
            self.layout = layout_of(first)
        except DataError as error:
            raise error.in_row(self._rows.where(0)) from None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Conversation:
        index = range(len(self))[index]
        row, where = without_empty_texts(self._rows[index]), self._rows.where(index)
        row_id = self._rows.name_of(index)
        try:
            row_id = id_of(row) or row_id
            return conversation_from(
                self.layout.read(row, self.read_options.prompt),
                row_id=row_id,
                root=self.read_options.root or self.file.parent,
                index=index,
                columns=self.layout.columns(row),
                where=where,
                read_options=self.read_options,
            )
        except DataError as error:
            raise error.in_row(where, row_id) from None
