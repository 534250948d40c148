"""Rows in files: where each begins is found once, in one pass, and a row is read from disk when it is asked for."""

from __future__ import annotations

import atexit
import codecs
import csv
import gzip
import hashlib
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qwenvl_lit.types import DataError

_VERSION = 1  # of an index on disk
_BLOCK = 1 << 22
_BLANK = re.compile(r"[ \t\r\n]*")
csv.field_size_limit(1 << 30)  # the default is less than an image in base64
_MARK = b"\xef\xbb\xbf"  # which some Windows editors write in front


class RowFile(Sequence[dict[str, Any]]):
    """The rows of one file, plain or packed as `.gz`: a JSON array, a JSON object a line (blank lines are passed over), or `.csv` with a
    header line, whose empty cells are None.

    A million rows take 24 MB; the file itself is not held in memory. With `cache`, indexes and unpacked files are kept there and used again
    until the file changes.

    Raises:
        DataError: the file cannot be read, is not what its name and beginning say, or has no rows; taking a row raises it for that row.
    """

    def __init__(self, file: Path, cache: Path | None = None):
        self.file = file
        self.header: list[str] = []
        kept = None if cache is None else cache / "indexes"
        with _readable(file):
            self._plain = _unpacked(file, kept) if file.suffix == ".gz" else file
            self._version = _version(self._plain)
            self._kind, find = self._look()
            self._index = _index(self._plain, find, kept)
        if not len(self):
            raise DataError(
                f"{file} has no rows; expected a JSON array of rows, a row a line, or a header line of a csv file and rows"
            )

    def _look(self) -> tuple[str, Callable[[BinaryIO], np.ndarray]]:
        """What kind of file it is, and the function that finds its rows."""
        name = self.file.name.removesuffix(".gz").lower()
        if name.endswith(".csv"):
            with self._plain.open("rb") as stream:
                self.header, _ = next(_records(stream, self.file), ([], ()))
            if not self.header:
                raise DataError(
                    f"{self.file} is empty; expected a header line that names the columns"
                )
            if twice := sorted({column for column in self.header if self.header.count(column) > 1}):
                raise DataError(
                    f"{self.file}:1: columns {twice} stand twice in the header {self.header}"
                )
            return "csv", lambda stream: _array(
                islice((place for _, place in _records(stream, self.file)), 1, None)
            )
        with self._plain.open("rb") as stream:
            block = stream.read(_BLOCK).removeprefix(_MARK)
            if not block:
                raise DataError(
                    f"{self.file} is empty; expected a JSON array of rows, or a row a line"
                )
            while block and not block.strip(b" \t\r\n"):
                block = stream.read(_BLOCK)
        if block.lstrip(b" \t\r\n")[:1] == b"[":
            return "array", lambda stream: _array(_elements(stream, self.file))
        return "lines", _lines

    def __len__(self) -> int:
        return self._index.shape[1]

    def where(self, place: int) -> str:
        """`file:line` of a row."""
        return f"{self.file}:{self._index[2, place]}"

    def line(self, place: int) -> int:
        """The line on which a row begins, counted from 1."""
        return int(self._index[2, place])

    def __getitem__(self, place: int) -> dict[str, Any]:
        start, end, _ = map(int, self._index[:, place])
        with _readable(self.file):
            content = os.pread(_stream(self._plain, self._version).fileno(), end - start, start)
        try:
            text = content.decode()
        except UnicodeDecodeError as fault:
            raise DataError(f"{self.where(place)}: not UTF-8: {fault}; save it as UTF-8") from None
        if self._kind == "csv":
            cells = next(csv.reader([text], strict=True))
            if len(cells) != len(self.header):
                raise DataError(
                    f"{self.where(place)}: {len(cells)} cells, but the header names {len(self.header)} columns: {self.header}"
                )
            return {column: cell or None for column, cell in zip(self.header, cells, strict=True)}
        try:
            row = parse_json(text)
        except ValueError as fault:
            raise DataError(f"{self.where(place)}: not JSON: {fault}") from None
        if not isinstance(row, dict):
            raise DataError(
                f"{self.where(place)}: a row is a JSON object, got {type(row).__name__}"
            )
        return row


def parse_json(text: str) -> Any:
    """JSON to the letter: no key twice, no NaN.

    Raises:
        ValueError: it is not; or it is nested too deeply to be read.
    """
    try:
        return _STRICT.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(
            f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object"
        )
    return found


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number; write null or a number")


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
_BOUNDS = json.JSONDecoder(
    parse_int=len, parse_float=len
)  # numbers are not looked at when only ends are sought


@lru_cache(maxsize=64)
def _stream(file: Path, version: tuple[int, int]) -> BinaryIO:
    """Kept open in each process, a few of perhaps thousands; reads go by position, so that forked processes may share it."""
    stream = file.open("rb", buffering=0)
    if _version(file) != version:
        raise DataError(f"{file} has changed since it was opened; start again")
    return stream


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as fault:
        raise DataError(f"{file} is not a complete gzip file: {fault}") from None
    except OSError as fault:
        raise DataError(
            f"{fault.filename or file} cannot be read or unpacked: {fault.strerror or fault}; check the path"
        ) from None


def _version(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _kept(file: Path, folder: Path, ending: str) -> Path:
    """Where in `folder` something is kept that was made from `file` as it is now."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / (
        hashlib.sha256(f"{_VERSION} {file.resolve()} {_version(file)}".encode()).hexdigest()[:32]
        + ending
    )


@contextmanager
def _appearing(target: Path) -> Iterator[BinaryIO]:
    """A file that is there when it is complete; of several processes the last to finish wins, all write the same."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.stem[:16], suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


def _unpacked(file: Path, folder: Path | None) -> Path:
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="qwenvl_lit_"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = _kept(file, folder, ".rows")
    if not target.exists():
        with gzip.open(file) as source, _appearing(target) as copy:
            shutil.copyfileobj(source, copy, _BLOCK)
    return target


def _index(file: Path, find: Callable[[BinaryIO], np.ndarray], folder: Path | None) -> np.ndarray:
    """First byte, byte after the last, and line of each row: int64 (3, rows)."""
    kept = None if folder is None else _kept(file, folder, ".npy")
    if kept is not None and (index := _read_index(kept, file.stat().st_size)) is not None:
        return index
    with file.open("rb") as stream:
        index = find(stream)
    if kept is not None:
        with _appearing(kept) as stream:
            np.save(stream, index)
    return index


def _read_index(kept: Path, size: int) -> np.ndarray | None:
    """The index that an earlier run has written, unless it is damaged."""
    try:
        index = np.load(kept)
    except (OSError, ValueError, EOFError):
        return None
    if index.dtype != np.int64 or index.ndim != 2 or len(index) != 3:
        return None
    starts, ends, lines = index
    sound = (
        (starts < ends).all()
        and (ends[:-1] <= starts[1:]).all()
        and (ends <= size).all()
        and (lines > 0).all()
    )
    return index if sound else None


def _array(rows: Iterable[tuple[int, int, int]]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(rows), np.int64).reshape(-1, 3).T.copy()


def _lines(stream: BinaryIO) -> np.ndarray:
    """The lines that are not blank."""
    start = len(_MARK) if stream.read(len(_MARK)) == _MARK else 0
    stream.seek(start)
    breaks, firsts, at, first_of_next = [], [], start, True
    while block := stream.read(_BLOCK):
        content = np.frombuffer(block, np.uint8)
        found = np.flatnonzero(content == ord("\n"))
        after = found[found + 1 < len(content)] + 1
        firsts.append(content[np.concatenate(([0], after)) if first_of_next else after])
        first_of_next = len(found) > 0 and found[-1] + 1 == len(content)
        breaks.append(found + at)
        at += len(block)
    if not first_of_next:
        breaks.append(np.array([at]))  # the last line may end without a break
    ends = np.concatenate([np.empty(0, np.int64), *breaks])
    starts = np.concatenate(([start], ends[:-1] + 1))[: len(ends)]
    real = np.concatenate([np.empty(0, np.uint8), *firsts]) > ord(" ")
    for place in np.flatnonzero(~real):  # few: rows begin with a brace
        stream.seek(starts[place])
        real[place] = bool(stream.read(ends[place] - starts[place]).strip())
    return np.stack((starts, ends, np.arange(1, len(ends) + 1)))[:, real]


def _records(stream: BinaryIO, file: Path) -> Iterator[tuple[list[str], tuple[int, int, int]]]:
    """Cells and place of each record of a csv file, the header first; blank lines are passed over."""
    end = len(_MARK) if stream.read(len(_MARK)) == _MARK else 0
    stream.seek(end)
    number = 0

    def lines() -> Iterator[str]:
        nonlocal end, number
        for line in stream:
            end += len(line)
            number += 1
            try:
                yield line.decode()
            except UnicodeDecodeError as fault:
                raise DataError(f"{file}:{number}: not UTF-8: {fault}; save it as UTF-8") from None

    records = csv.reader(lines(), strict=True)
    while True:
        start, line = end, number + 1
        try:
            cells = next(records)
        except StopIteration:
            return
        except csv.Error as fault:
            raise DataError(
                f"{file}:{line}: not CSV: {fault}; cells with quotes or line breaks are quoted, their quotes doubled"
            ) from None
        if cells:
            yield cells, (start, end, line)


def _elements(stream: BinaryIO, file: Path) -> Iterator[tuple[int, int, int]]:
    """The elements of a JSON array, which may be laid out in any way."""
    text = _Text(stream, file)
    expected = "["
    while text.next() == expected:
        text.skip(1)
        if text.next() == "]" and expected == "[":
            break
        start, line = text.byte, text.line
        text.skip(text.value())
        yield start, text.byte, line
        expected = ","
    if text.next() != "]":
        found = repr(text.next()) if text.next() else "the end of the file"
        raise DataError(f"{file}:{text.line}: not JSON: expected , or ] in the array, got {found}")
    text.skip(1)
    if text.next():
        raise DataError(
            f"{file}:{text.line}: not JSON: the array has ended, but {text.next()!r} follows"
        )


class _Text:
    """A text file from which a stretch is held, and the character, byte and line reached in it."""

    def __init__(self, stream: BinaryIO, file: Path):
        self.stream, self.file = stream, file
        self.byte = len(_MARK) if stream.read(len(_MARK)) == _MARK else 0
        stream.seek(self.byte)
        self.held, self.place, self.line = "", 0, 1
        self.decoder = codecs.getincrementaldecoder("utf-8")()

    def skip(self, count: int) -> None:
        past = self.held[self.place : self.place + count]
        self.place += count
        self.byte += len(past) if past.isascii() else len(past.encode())
        self.line += past.count("\n")

    def next(self) -> str:
        """The next character that is not blank, now reached; empty at the end of the file."""
        while True:
            self.skip(_BLANK.match(self.held, self.place).end() - self.place)
            if self.place < len(self.held) or not self._read_on():
                return self.held[self.place : self.place + 1]

    def value(self) -> int:
        """How many characters the JSON value takes that begins here."""
        while True:
            try:
                return _BOUNDS.raw_decode(self.held, self.place)[1] - self.place
            except json.JSONDecodeError as fault:
                cut_off = fault.pos > len(self.held) - 16 or fault.msg.startswith(
                    "Unterminated string"
                )
                if not (cut_off and self._read_on()):
                    line = self.line + self.held.count("\n", self.place, fault.pos)
                    raise DataError(f"{self.file}:{line}: not JSON: {fault.msg}") from None
            except RecursionError:
                raise DataError(
                    f"{self.file}:{self.line}: not JSON: it is nested too deeply"
                ) from None

    def _read_on(self) -> bool:
        """Hold what is not passed yet and as much again; false at the end of the file."""
        self.held, self.place = self.held[self.place :], 0
        block = self.stream.read(max(_BLOCK, len(self.held)))
        try:
            self.held += self.decoder.decode(block, final=not block)
        except UnicodeDecodeError as fault:
            line = self.line + self.held.count("\n") + fault.object[: fault.start].count(b"\n")
            raise DataError(
                f"{self.file}:{line}: not UTF-8: {fault.reason}; save it as UTF-8"
            ) from None
        return bool(block)
