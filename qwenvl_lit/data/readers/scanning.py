"""Finds where the rows of a file begin and end, in one pass over its bytes."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from qwenvl_lit.data.readers.json_errors import explain
from qwenvl_lit.types import DataError

BLOCK = 1 << 22  # bytes
BOM = b"\xef\xbb\xbf"  # some Windows editors begin UTF-8 files with it

# First byte, byte after the last, and line of a row, counted from 1.
Location = tuple[int, int, int]

_BLANKS = re.compile(r"[ \t\r\n]*")
# Only finds where values end, so numbers need not be converted.
_BOUNDS_DECODER = json.JSONDecoder(parse_int=len, parse_float=len)
csv.field_size_limit(1 << 30)  # the default is smaller than an image in base64


def _skip_bom(stream: BinaryIO) -> int:
    """Moves `stream`, just opened, past the byte order mark; returns its position."""
    start = len(BOM) if stream.read(len(BOM)) == BOM else 0
    stream.seek(start)
    return start


def find_lines(stream: BinaryIO) -> np.ndarray:
    """Returns the index of the lines that are not blank."""
    start = _skip_bom(stream)
    line_breaks: list[np.ndarray] = [np.empty(0, np.int64)]  # their positions in the file
    first_bytes: list[np.ndarray] = [np.empty(0, np.uint8)]  # of each line
    position, at_line_start = start, True
    while block := stream.read(BLOCK):
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


def find_records(
    stream: BinaryIO, file: Path, delimiter: str
) -> Iterator[tuple[list[str], Location]]:
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
                raise not_utf8(file, error).in_row(f"{file}:{line}") from None

    records = csv.reader(lines(), delimiter=delimiter, strict=True)
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


def not_utf8(file: Path, error: UnicodeDecodeError) -> DataError:
    """Returns the error about a byte that UTF-8 does not allow there."""
    line_start = error.object.rfind(b"\n", 0, error.start) + 1
    before = error.object[max(line_start, error.start - 20) : error.start]
    return DataError(
        f"not UTF-8: byte 0x{error.object[error.start]:02x} after "
        f"{before.decode(errors='ignore')!r}; save it as UTF-8. iconv -f ENCODING -t UTF-8 "
        f"{file.name} converts it, where ENCODING is the one it has, such as latin1 or cp1256"
    )


def find_elements(stream: BinaryIO, file: Path) -> Iterator[Location]:
    """Yields the elements of a JSON array in any formatting."""
    text = JSONText(stream, file)
    expected = "["
    while text.peek() == expected:
        text.skip(1)
        if text.peek() == "]" and expected == "[":
            break
        if text.peek() == "]":
            raise DataError(
                f"not JSON: the comma before the end of the array, after row {text.row}, must be "
                f"removed"
            ).in_row(f"{file}:{text.line}")
        text.row += 1
        start, line = text.byte, text.line
        text.skip(text.value_length())
        yield start, text.byte, line
        expected = ","
    if text.peek() != "]":
        actual = repr(text.peek()) if text.peek() else "the end of the file"
        where = text.where(text.line)
        raise DataError(f"{where}: not JSON: expected , or ] in the array, got {actual}")
    text.skip(1)
    if text.peek():
        raise DataError(
            f"{file}:{text.line}: not JSON: the array has ended, but {text.peek()!r} follows"
        )


def is_object_over_lines(stream: BinaryIO) -> bool:
    """Tells whether a file, just opened, begins with a JSON object of several lines."""
    _skip_bom(stream)
    text = stream.read(BLOCK).decode(errors="replace").lstrip()
    if not text.startswith("{"):
        return False
    try:
        _, end = _BOUNDS_DECODER.raw_decode(text)
    except (json.JSONDecodeError, RecursionError):
        return text[1:].lstrip(" \t\r").startswith("\n")
    return "\n" in text[:end]


class JSONText:
    """A position in a JSON file, of which a section is in memory.

    `byte` and `line` are the position in the file; `row` is the number of the row, for messages.
    """

    def __init__(self, stream: BinaryIO, file: Path):
        self.byte = _skip_bom(stream)
        self.line = 1
        self.row = 0
        self._stream, self._file = stream, file
        self._section, self._position = "", 0  # the position in the section
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def where(self, line: int) -> str:
        return f"{self._file}:{line} (row {self.row})"

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
            start = self._position
            try:
                return _BOUNDS_DECODER.raw_decode(self._section, start)[1] - start
            except json.JSONDecodeError as error:
                # The value may only be cut off by the end of the section.
                cut_off = error.pos > len(self._section) - 16
                cut_off = cut_off or error.msg.startswith("Unterminated string")
                if not (cut_off and self._read_more()):
                    line = self.line + error.doc.count("\n", start, error.pos)
                    rest = error.doc[error.pos : error.pos + 20]
                    found = repr(rest) if rest else "the end of the file"
                    message = f"not JSON: {explain(error)}, at {found}"
                    raise DataError(message).in_row(self.where(line)) from None
            except RecursionError:
                where = self.where(self.line)
                raise DataError(f"{where}: not JSON: it is nested too deeply") from None

    def _read_more(self) -> bool:
        """Drops what is passed and at least doubles the rest; False at the end of the file."""
        self._section, self._position = self._section[self._position :], 0
        block = self._stream.read(max(BLOCK, len(self._section)))
        try:
            self._section += self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            line = self.line + self._section.count("\n")
            line += error.object[: error.start].count(b"\n")
            # What is read is ahead of the current row, so only the line is known.
            raise not_utf8(self._file, error).in_row(f"{self._file}:{line}") from None
        return bool(block)
