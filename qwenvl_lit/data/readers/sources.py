"""Files as sequences of conversations. A row is parsed when it is fetched; every fault names file, line and id."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from qwenvl_lit.data.readers.files import RowFile
from qwenvl_lit.data.readers.layouts import id_of, layout_of
from qwenvl_lit.data.readers.rows import DEFAULT, ReadOptions, conversation_from
from qwenvl_lit.data.split import Concat, counted, take
from qwenvl_lit.types import Conversation, DataError


def read_rows(source: str, read_options: ReadOptions = DEFAULT) -> Sequence[Conversation]:
    """Rows of json, jsonl or csv files, plain or as .gz, in any of the layouts of `data/layouts.py`; each file has one layout.

    Args:
        source: a path or a glob; with `#N` behind it, N of its rows (see `take`).

    Raises:
        DataError: there is no such file, or its first row has no known layout.
    """
    return open_source(source, read_options, lambda file: FileRows(file, read_options))


def open_source(
    source: str, read_options: ReadOptions, read: Callable[[Path], Sequence[Conversation]]
) -> Sequence[Conversation]:
    """The rows that `read` finds in the file or files that `source` names, or as many of them as it asks for.

    Raises:
        DataError: there is no such file.
    """
    pattern, count = counted(source)
    places = [pattern] if read_options.root is None else [str(read_options.root / pattern), pattern]
    found = next(filter(None, map(_files, places)), [])
    if not found:
        raise DataError(
            f"no file {' or '.join(places)}, seen from {Path.cwd()}; check the path and `data.root`"
        )
    parts = [read(Path(file)) for file in found]
    rows = parts[0] if len(parts) == 1 else Concat(parts)
    return rows if count is None else take(rows, count, read_options.seed)


def _files(pattern: str) -> list[str]:
    return [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))


class FileRows(Sequence[Conversation]):
    """The rows of one file. All have the layout of the first, which is `layout`.

    Raises:
        DataError: as `RowFile`, or the first row has no known layout; fetching a row raises it, or Dropped, for that row.
    """

    def __init__(self, file: Path, read_options: ReadOptions = DEFAULT):
        self.file = file
        self.read_options = read_options
        self._rows = RowFile(file, read_options.cache)
        first = self._rows[0]
        try:
            self.layout = layout_of(first)
        except DataError as fault:
            raise DataError(f"{self._rows.where(0)}: {fault}") from None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> Conversation:
        place = range(len(self))[place]
        row, where = self._rows[place], self._rows.where(place)
        name = f"{self.file.name}:{self._rows.line(place)}"
        try:
            name = id_of(row) or name
            draft = self.layout.read(row, self.read_options.prompt)
            return conversation_from(
                draft,
                id=name,
                root=self.read_options.root or self.file.parent,
                index=place,
                columns=self.layout.columns(row),
                where=where,
                read_options=self.read_options,
            )
        except DataError as fault:
            raise type(fault)(f"{where}: row {name!r}: {fault}") from None
