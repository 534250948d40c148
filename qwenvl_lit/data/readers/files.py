"""Rows in text files. One pass finds where each row begins; a row is read when it is fetched.

This is not `datasets` or pyarrow because errors name the file and the line of a row.
"""

from __future__ import annotations

import atexit
import csv
import gzip
import hashlib
import json
import os
import reprlib
import shutil
import stat
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qwenvl_lit.atomic import disk_errors, write_to_cache
from qwenvl_lit.data.expansion import check_expansion
from qwenvl_lit.data.readers.formats import GZIP, READ, check_is_read, delimiters
from qwenvl_lit.data.readers.json_errors import explain
from qwenvl_lit.data.readers.scanning import (
    BLOCK,
    BOM,
    Location,
    find_elements,
    find_lines,
    find_records,
    is_object_over_lines,
    not_utf8,
)
from qwenvl_lit.stored_files import LFS_POINTER, lfs_pointer
from qwenvl_lit.terminal import counted
from qwenvl_lit.types import DataError

_VERSION = 2  # of the indexes on disk

_NAMES = reprlib.Repr()
_NAMES.maxlist, _NAMES.maxstring = 20, 60
list_names = _NAMES.repr  # shortens long lists of keys or columns, and long names


class RowFile(Sequence[dict[str, Any]]):
    """The rows of one file, which may be compressed as `.gz`.

    A file is a JSON array; or has a JSON object on each line, blank lines aside; or is a `.csv` or
    `.tsv` with a header line, whose empty cells become None.

    The index of a million rows takes 24 MB; the file itself is not held in memory. Indexes and
    decompressed files are kept in `cache`, if given, and reused until the file changes.

    Raises:
        DataError: the file cannot be read, is not what its name and its beginning say, or has no
            rows. Fetching a row raises it for that row.
    """

    def __init__(self, file: Path, cache: Path | None = None):
        self.file = file
        self.header: list[str] = []
        self._delimiter = ","
        folder = None if cache is None else cache / "indexes"
        check_is_file(file)
        with _readable(file):
            self._plain = _decompressed(file, folder) if file.suffix == ".gz" else file
            self._version = file_version(self._plain)
            self._format, find_rows = self._detect_format()
            self._index = _index(self._plain, find_rows, folder)
        if not len(self) and self.header:
            raise DataError(f"{file} has no rows below its header line")
        if not len(self):
            raise DataError(f"{file} has no rows; expected a JSON array of rows, or one row a line")

    def _detect_format(self) -> tuple[str, Callable[[BinaryIO], np.ndarray]]:
        """Returns the format of the file and the function that indexes its rows."""
        with self._plain.open("rb") as stream:
            block = stream.read(BLOCK).removeprefix(BOM)
            check_is_read(self.file, block)
            if delimiters(self.file):
                self.header = self._read_header()
                return "csv", self._record_index
            if not block:
                raise DataError(
                    f"{self.file} is empty; expected a JSON array of rows, or one row a line"
                )
            while block and not block.strip(b" \t\r\n"):
                block = stream.read(BLOCK)
        if block.lstrip(b" \t\r\n")[:1] == b"[":
            return "array", lambda stream: _to_index(find_elements(stream, self.file))
        return "lines", find_lines

    def _read_header(self) -> list[str]:
        candidates = delimiters(self.file)
        for self._delimiter in candidates:
            header = self._first_record()
            if len(header) > 1:
                break
        else:  # a single column
            self._delimiter = candidates[0]
            header = self._first_record()
        if not header:
            raise DataError(f"{self.file} is empty; expected a header line that names the columns")
        repeated = sorted(column for column, count in Counter(header).items() if count > 1)
        if repeated:
            raise DataError(
                f"{self.file}:1: columns {list_names(repeated)} are repeated in the header "
                f"{list_names(header)}"
            )
        return header

    def _first_record(self) -> list[str]:
        with self._plain.open("rb") as stream:
            cells, _ = next(find_records(stream, self.file, self._delimiter), ([], ()))
        return cells

    def _record_index(self, stream: BinaryIO) -> np.ndarray:
        locations = (location for _, location in find_records(stream, self.file, self._delimiter))
        return _to_index(islice(locations, 1, None))  # the first one is the header

    def __len__(self) -> int:
        return self._index.shape[1]

    def where(self, index: int, lines: int = 0) -> str:
        """Returns `file:line` of a row; in an array followed by the row's number, counted from 1.

        A whole array may stand on one line.

        Args:
            lines: number of lines from the beginning of the row.
        """
        place = f"{self.file}:{self._index[2, index] + lines}"
        return f"{place} (row {index + 1})" if self._format == "array" else place

    def name_of(self, index: int) -> str:
        """Returns a name for a row that has no id, unique in the file.

        It is the file and the line; and the row's number if other rows begin on that line.
        """
        lines = self._index[2]
        name = f"{self.file.name}:{lines[index]}"
        shared = np.count_nonzero(lines[max(0, index - 1) : index + 2] == lines[index]) > 1
        return f"{name} (row {index + 1})" if shared else name

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, end, _ = map(int, self._index[:, index])
        with _readable(self.file):
            content = os.pread(_stream(self._plain, self._version).fileno(), end - start, start)
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            lines = content.count(b"\n", 0, error.start)
            raise not_utf8(self.file, error).in_row(self.where(index, lines)) from None
        if self._format == "csv":
            return self._parse_record(text, index)
        try:
            row = parse_json(text)
        except json.JSONDecodeError as error:
            message = f"not JSON: {explain(error)}, at column {error.colno}{self._advice(index)}"
            raise DataError(message).in_row(self.where(index, error.lineno - 1)) from None
        except ValueError as error:
            message = f"not JSON: {error}{self._advice(index)}"
            raise DataError(message).in_row(self.where(index)) from None
        if not isinstance(row, dict):
            message = f"a row must be a JSON object, got {type(row).__name__}"
            raise DataError(message).in_row(self.where(index))
        return row

    def _advice(self, index: int) -> str:
        """Returns what to do about a row that is not JSON: the first may be of another format."""
        if index or self._format != "lines":
            return ""
        with self._plain.open("rb") as stream:
            if is_object_over_lines(stream):
                return (
                    "; the file begins with a JSON object over several lines, but a jsonl file has "
                    "a row on each line. Write each row on one line, or all rows as an array: "
                    "[{...}, {...}]"
                )
        return f"; {READ}"

    def _parse_record(self, text: str, index: int) -> dict[str, str | None]:
        cells = next(csv.reader([text], delimiter=self._delimiter, strict=True))
        if len(cells) != len(self.header):
            raise DataError(
                f"{counted(len(cells), 'cell')}, but the header names "
                f"{counted(len(self.header), 'column')}: "
                f"{list_names(self.header)}"
            ).in_row(self.where(index))
        return {column: cell or None for column, cell in zip(self.header, cells, strict=True)}


def check_is_file(file: Path) -> None:
    """Raises an error unless `file` is a regular file.

    Reading a pipe would wait forever, and reading a device such as `/dev/zero` would not end.

    Raises:
        DataError: it is something else, a git-lfs pointer, or there is nothing.
    """
    beginning = b""
    try:
        mode = file.stat().st_mode
        if stat.S_ISREG(mode):
            with file.open("rb") as stream:
                beginning = stream.read(len(LFS_POINTER))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{file} cannot be read: {reason}; check the path") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise DataError(f"{file} is {kind}, expected a file; check the path")
    if beginning == LFS_POINTER:
        raise lfs_pointer(file)


def parse_json(text: str) -> Any:
    """Returns the value of strict JSON: no repeated keys, no NaN.

    Raises:
        ValueError: `text` is not strict JSON, or is nested too deeply.
    """
    try:
        return _STRICT_DECODER.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        [(repeated, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {list_names(repeated)} is repeated in one object")
    return mapping


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number; write null or a number")


_STRICT_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)


@lru_cache(maxsize=64)
def _stream(file: Path, version: tuple[int, int]) -> BinaryIO:
    """Opens a file once a process; of perhaps thousands of files, 64 are kept open.

    Reads must give their position (`os.pread`), because forked processes share the stream.
    """
    stream = file.open("rb", buffering=0)
    if file_version(file) != version:
        raise DataError(f"{file} has changed since it was opened; start again")
    return stream


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turns the errors of reading or decompressing `file` into `DataError`s."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{file} is not a complete gzip file: {error}") from None
    except OSError as error:
        raise DataError(
            f"{error.filename or file} cannot be read or unpacked: {error.strerror or error}; "
            f"check the path"
        ) from None


def file_version(file: Path) -> tuple[int, int]:
    """Returns the size and the modification time of a file in nanoseconds."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _cached(file: Path, folder: Path, suffix: str) -> Path:
    """Returns the path in `folder` for a file that is made from the current version of `file`."""
    source = f"{_VERSION} {file.resolve()} {file_version(file)}"
    return folder / (hashlib.sha256(source.encode()).hexdigest()[:32] + suffix)


def _decompressed(file: Path, folder: Path | None) -> Path:
    """Returns a decompressed copy of `file`, in a temporary folder if `folder` cannot be used."""

    with file.open("rb") as stream:
        start = stream.read(len(GZIP))
    if start and start != GZIP:
        raise DataError(
            f"{file} is not compressed with gzip; if it is not compressed, remove .gz from its name"
        )

    def decompress(target: Path) -> None:
        compressed = file.stat().st_size
        with gzip.open(file) as source, target.open("wb") as copy:
            while block := source.read(BLOCK):
                check_expansion(file, compressed, copy.tell() + len(block))
                copy.write(block)

    if folder is not None:
        cached = _cached(file, folder, ".rows")
        if cached.exists() or write_to_cache(cached, decompress):
            return cached
    with disk_errors(Path(tempfile.gettempdir()), "free disk space there, or set TMPDIR"):
        temporary = Path(tempfile.mkdtemp(prefix="qwenvl_lit_"))
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        target = _cached(file, temporary, ".rows")
        try:
            decompress(target)
        except gzip.BadGzipFile as error:
            raise DataError(f"{file} is not a complete gzip file: {error}") from None
    return target


def _index(
    file: Path, find_rows: Callable[[BinaryIO], np.ndarray], folder: Path | None
) -> np.ndarray:
    """Returns the `Location` of each row, int64 (3, rows)."""
    cached = None if folder is None else _cached(file, folder, ".npy")
    if cached is not None:
        index = _read_index(cached, file.stat().st_size)
        if index is not None:
            return index
    with file.open("rb") as stream:
        index = find_rows(stream)
    if cached is not None:
        write_to_cache(cached, lambda unfinished: _write_index(unfinished, index))
    return index


def _write_index(file: Path, index: np.ndarray) -> None:
    with file.open("wb") as stream:
        np.save(stream, index)


def _read_index(cached: Path, size: int) -> np.ndarray | None:
    """Returns the index that an earlier run has written; None if there is none or it is damaged."""
    try:
        index = np.load(cached)
    except (OSError, ValueError, EOFError):
        return None
    if index.dtype != np.int64 or index.ndim != 2 or len(index) != 3:
        return None
    starts, ends, lines = index
    in_order = (starts < ends).all() and (ends[:-1] <= starts[1:]).all()
    in_file = (ends <= size).all() and (lines > 0).all()
    if not (in_order and in_file):
        return None
    return index


def _to_index(locations: Iterable[Location]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(locations), np.int64).reshape(-1, 3).T.copy()
