"""Rows in files. One pass finds where each row begins; a row is read from disk when it is fetched.

This is not `datasets` or pyarrow because errors name the file and the line of a row.
"""

from __future__ import annotations

import atexit
import codecs
import csv
import gzip
import hashlib
import json
import os
import re
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
from qwenvl_lit.types import DataError

_VERSION = 1  # of the indexes on disk
_BLOCK = 1 << 22  # bytes
_BLANKS = re.compile(r"[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"  # some Windows editors begin UTF-8 files with it
csv.field_size_limit(1 << 30)  # the default is smaller than an image in base64

_NAMES = reprlib.Repr()
_NAMES.maxlist, _NAMES.maxstring = 20, 60
list_names = _NAMES.repr  # shortens long lists of keys or columns, and long names

# First byte, byte after the last, and line of a row, counted from 1.
Location = tuple[int, int, int]


class RowFile(Sequence[dict[str, Any]]):
    """The rows of one file, which may be compressed as `.gz`.

    A file is a JSON array; or has a JSON object on each line, blank lines aside; or is a `.csv`
    with a header line, whose empty cells become None.

    The index of a million rows takes 24 MB; the file itself is not held in memory. Indexes and
    decompressed files are kept in `cache`, if given, and reused until the file changes.

    Raises:
        DataError: the file cannot be read, is not what its name and its beginning say, or has no
            rows. Fetching a row raises it for that row.
    """

    def __init__(self, file: Path, cache: Path | None = None):
        self.file = file
        self.header: list[str] = []
        folder = None if cache is None else cache / "indexes"
        check_is_file(file)
        with _readable(file):
            self._plain = _decompressed(file, folder) if file.suffix == ".gz" else file
            self._version = _version(self._plain)
            self._format, find_rows = self._detect_format()
            self._index = _index(self._plain, find_rows, folder)
        if not len(self):
            raise DataError(
                f"{file} has no rows; expected a JSON array of rows, one row a line, or a csv file "
                f"with a header line and rows"
            )

    def _detect_format(self) -> tuple[str, Callable[[BinaryIO], np.ndarray]]:
        """Returns the format of the file and the function that indexes its rows."""
        if self.file.name.removesuffix(".gz").lower().endswith(".csv"):
            self.header = self._read_header()
            return "csv", self._find_records
        with self._plain.open("rb") as stream:
            block = stream.read(_BLOCK).removeprefix(_BOM)
            if not block:
                raise DataError(
                    f"{self.file} is empty; expected a JSON array of rows, or one row a line"
                )
            while block and not block.strip(b" \t\r\n"):
                block = stream.read(_BLOCK)
        if block.lstrip(b" \t\r\n")[:1] == b"[":
            return "array", lambda stream: _to_index(_elements(stream, self.file))
        return "lines", _find_lines

    def _read_header(self) -> list[str]:
        with self._plain.open("rb") as stream:
            header, _ = next(_records(stream, self.file), ([], ()))
        if not header:
            raise DataError(f"{self.file} is empty; expected a header line that names the columns")
        repeated = sorted(column for column, count in Counter(header).items() if count > 1)
        if repeated:
            raise DataError(
                f"{self.file}:1: columns {list_names(repeated)} are repeated in the header "
                f"{list_names(header)}"
            )
        return header

    def _find_records(self, stream: BinaryIO) -> np.ndarray:
        locations = (location for _, location in _records(stream, self.file))
        return _to_index(islice(locations, 1, None))  # the first one is the header

    def __len__(self) -> int:
        return self._index.shape[1]

    def where(self, index: int) -> str:
        """Returns `file:line` of a row."""
        return f"{self.file}:{self._index[2, index]}"

    def line(self, index: int) -> int:
        """Returns the line on which a row begins, counted from 1."""
        return int(self._index[2, index])

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, end, _ = map(int, self._index[:, index])
        with _readable(self.file):
            content = os.pread(_stream(self._plain, self._version).fileno(), end - start, start)
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.where(index)}: not UTF-8: {error}; save it as UTF-8") from None
        if self._format == "csv":
            return self._parse_record(text, index)
        try:
            row = parse_json(text)
        except ValueError as error:
            raise DataError(f"{self.where(index)}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(
                f"{self.where(index)}: a row must be a JSON object, got {type(row).__name__}"
            )
        return row

    def _parse_record(self, text: str, index: int) -> dict[str, str | None]:
        cells = next(csv.reader([text], strict=True))
        if len(cells) != len(self.header):
            raise DataError(
                f"{self.where(index)}: {len(cells)} cells, but the header names "
                f"{len(self.header)} columns: {list_names(self.header)}"
            )
        return {column: cell or None for column, cell in zip(self.header, cells, strict=True)}


def check_is_file(file: Path) -> None:
    """Raises an error unless `file` is a regular file.

    Reading a pipe would wait forever, and reading a device such as `/dev/zero` would not end.

    Raises:
        DataError: it is something else, or there is nothing.
    """
    try:
        mode = file.stat().st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{file} cannot be read: {reason}; check the path") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise DataError(f"{file} is {kind}, expected a file; check the path")


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
# Only finds where values end, so numbers need not be converted.
_BOUNDS_DECODER = json.JSONDecoder(parse_int=len, parse_float=len)


@lru_cache(maxsize=64)
def _stream(file: Path, version: tuple[int, int]) -> BinaryIO:
    """Opens a file once a process; of perhaps thousands of files, 64 are kept open.

    Reads must give their position (`os.pread`), because forked processes share the stream.
    """
    stream = file.open("rb", buffering=0)
    if _version(file) != version:
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


def _version(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _cached(file: Path, folder: Path, suffix: str) -> Path:
    """Returns the path in `folder` for a file that is made from the current version of `file`."""
    source = f"{_VERSION} {file.resolve()} {_version(file)}"
    return folder / (hashlib.sha256(source.encode()).hexdigest()[:32] + suffix)


def _decompressed(file: Path, folder: Path | None) -> Path:
    """Returns a decompressed copy of `file`, in a temporary folder if `folder` cannot be used."""

    def decompress(target: Path) -> None:
        with gzip.open(file) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy, _BLOCK)

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


def _skip_bom(stream: BinaryIO) -> int:
    """Moves `stream`, just opened, past the byte order mark; returns its position."""
    start = len(_BOM) if stream.read(len(_BOM)) == _BOM else 0
    stream.seek(start)
    return start


def _find_lines(stream: BinaryIO) -> np.ndarray:
    """Returns the index of the lines that are not blank."""
    start = _skip_bom(stream)
    line_breaks: list[np.ndarray] = [np.empty(0, np.int64)]  # their positions in the file
    first_bytes: list[np.ndarray] = [np.empty(0, np.uint8)]  # of each line
    position, at_line_start = start, True
    while block := stream.read(_BLOCK):
        content = np.frombuffer(block, np.uint8)
        breaks = np.flatnonzero(content == ord("\n"))
        line_starts = breaks[breaks + 1 < len(content)] + 1
        if at_line_start:
            line_starts = np.concatenate(([0], line_starts))
        first_bytes.append(content[line_starts])
        line_breaks.append(breaks + position)
        at_line_start = len(breaks) > 0 and breaks[-1] + 1 == len(content)
        position += len(block)
    if not at_line_start:
        line_breaks.append(np.array([position]))  # the last line may end without a line break
    ends = np.concatenate(line_breaks)
    starts = np.concatenate(([start], ends[:-1] + 1))[: len(ends)]
    is_row = np.concatenate(first_bytes) > ord(" ")
    for index in np.flatnonzero(~is_row):  # few lines, since rows begin with a brace
        stream.seek(starts[index])
        is_row[index] = bool(stream.read(ends[index] - starts[index]).strip())
    return np.stack((starts, ends, np.arange(1, len(ends) + 1)))[:, is_row]


def _records(stream: BinaryIO, file: Path) -> Iterator[tuple[list[str], Location]]:
    """Yields the records of a csv file that are not blank, the header first."""
    end = _skip_bom(stream)
    line = 0

    def lines() -> Iterator[str]:
        nonlocal end, line
        for content in stream:
            end += len(content)
            line += 1
            try:
                yield content.decode()
            except UnicodeDecodeError as error:
                raise DataError(f"{file}:{line}: not UTF-8: {error}; save it as UTF-8") from None

    records = csv.reader(lines(), strict=True)
    while True:
        start, first_line = end, line + 1
        try:
            cells = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{file}:{first_line}: not CSV: {error}; put cells with quotes or line breaks in "
                f"quotes, and double the quotes in them"
            ) from None
        if cells:
            yield cells, (start, end, first_line)


def _elements(stream: BinaryIO, file: Path) -> Iterator[Location]:
    """Yields the elements of a JSON array in any formatting."""
    text = _JSONText(stream, file)
    expected = "["
    while text.peek() == expected:
        text.skip(1)
        if text.peek() == "]" and expected == "[":
            break
        start, line = text.byte, text.line
        text.skip(text.value_length())
        yield start, text.byte, line
        expected = ","
    if text.peek() != "]":
        actual = repr(text.peek()) if text.peek() else "the end of the file"
        raise DataError(f"{file}:{text.line}: not JSON: expected , or ] in the array, got {actual}")
    text.skip(1)
    if text.peek():
        raise DataError(
            f"{file}:{text.line}: not JSON: the array has ended, but {text.peek()!r} follows"
        )


class _JSONText:
    """A position in a JSON file, of which a section is in memory.

    `byte` and `line` are the position in the file.
    """

    def __init__(self, stream: BinaryIO, file: Path):
        self.byte = _skip_bom(stream)
        self.line = 1
        self._stream, self._file = stream, file
        self._section, self._position = "", 0  # the position in the section
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def skip(self, characters: int) -> None:
        passed = self._section[self._position : self._position + characters]
        self._position += characters
        self.byte += len(passed) if passed.isascii() else len(passed.encode())
        self.line += passed.count("\n")

    def peek(self) -> str:
        """Moves to the next character that is not blank and returns it; "" at the end."""
        while True:
            self.skip(_BLANKS.match(self._section, self._position).end() - self._position)
            if self._position < len(self._section) or not self._read_more():
                return self._section[self._position : self._position + 1]

    def value_length(self) -> int:
        """Returns the number of characters of the JSON value that begins here."""
        while True:
            try:
                return _BOUNDS_DECODER.raw_decode(self._section, self._position)[1] - self._position
            except json.JSONDecodeError as error:
                # The value may only be cut off by the end of the section.
                cut_off = error.pos > len(self._section) - 16
                cut_off = cut_off or error.msg.startswith("Unterminated string")
                if not (cut_off and self._read_more()):
                    line = self.line + self._section.count("\n", self._position, error.pos)
                    raise DataError(f"{self._file}:{line}: not JSON: {error.msg}") from None
            except RecursionError:
                raise DataError(
                    f"{self._file}:{self.line}: not JSON: it is nested too deeply"
                ) from None

    def _read_more(self) -> bool:
        """Drops what is passed and at least doubles the rest; False at the end of the file."""
        self._section, self._position = self._section[self._position :], 0
        block = self._stream.read(max(_BLOCK, len(self._section)))
        try:
            self._section += self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            line = self.line + self._section.count("\n")
            line += error.object[: error.start].count(b"\n")
            raise DataError(
                f"{self._file}:{line}: not UTF-8: {error.reason}; save it as UTF-8"
            ) from None
        return bool(block)
