"""Files as sequences of conversations. A row is parsed when it is fetched; every fault names file, line and id."""

from __future__ import annotations

import glob
import json
import mmap
import os
import random
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qwenvl_lit.data.layouts import VQA_PROMPT, layout_of
from qwenvl_lit.data.rows import DEFAULT, Reading, conversation_from
from qwenvl_lit.data.split import Chosen, Joined
from qwenvl_lit.types import Conversation, DataError


def read_rows(source: str, reading: Reading = DEFAULT) -> Sequence[Conversation]:
    """Rows of json or jsonl files in any of the layouts of `data/layouts.py`.

    Args:
        source: a path or a glob; with `#N` behind it, N of its rows (see `take`).

    Raises:
        DataError: there is no such file, or its first row has no known layout.
    """
    return open_source(source, reading, lambda file: JsonRows(file, reading))


def take(rows: Sequence[Conversation], count: int, seed: int = 0) -> Sequence[Conversation]:
    """`count` rows: as many whole passes as fit in, then a random rest without repetition.

    >>> "".join(take("abc", 6))
    'abcabc'
    """
    passes, rest = divmod(count, len(rows))
    return Chosen(rows, [*range(len(rows))] * passes + random.Random(seed).sample(range(len(rows)), rest))


def open_source(source: str, reading: Reading, read: Callable[[Path], Sequence[Conversation]]) -> Sequence[Conversation]:
    """The rows that `read` finds in the file or files that `source` names, or as many of them as it asks for.

    Raises:
        DataError: there is no such file.
    """
    pattern, count = re.fullmatch(r"(.*?)(?:#(\d+))?", source, re.DOTALL).groups()
    places = [pattern] if reading.root is None else [str(reading.root / pattern), pattern]
    found = next(filter(None, map(_files, places)), [])
    if not found:
        raise DataError(f"no file {' or '.join(places)}, seen from {Path.cwd()}; check the path and `data.root`")
    parts = [read(Path(file)) for file in found]
    rows = parts[0] if len(parts) == 1 else Joined(parts)
    return rows if count is None else take(rows, int(count), reading.seed)


def _files(pattern: str) -> list[str]:
    return [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))


class JsonRows(Sequence[Conversation]):
    """The rows of one file: a JSON array, or a JSON object a line (blank lines are passed over). All have the layout of the first.

    Raises:
        DataError: the file does not exist, is not JSON, has no rows, or its first row has no known layout; fetching a row raises it for the
            faults of that row.
    """

    def __init__(self, file: Path, reading: Reading = DEFAULT):
        self.file = file
        self.reading = reading
        self._content = _mapped(file)
        self._starts, self._ends, self._lines = array("Q"), array("Q"), array("Q")
        for start, end, line in _bounds(self._content, file):
            self._starts.append(start)
            self._ends.append(end)
            self._lines.append(line)
        if not len(self):
            raise DataError(f"{file} has no rows; expected a JSON array of rows, or a row a line")
        first = self._row(0)
        try:
            self.layout = layout_of(first)
        except DataError as fault:
            raise DataError(f"{self._where(0)}: {fault}") from None

    def __reduce__(self):
        return JsonRows, (self.file, self.reading)  # the map of a file cannot be sent to another process

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, place: int) -> Conversation:
        place = range(len(self))[place]
        row = self._row(place)
        name = row.get("id", row.get("question_id"))
        name = f"{self.file.name}:{self._lines[place]}" if name is None else str(name)
        try:
            draft = self.layout.read(row, self.reading.prompt or VQA_PROMPT)
            root = self.reading.root or self.file.parent
            return conversation_from(draft, id=name, root=root, index=place, columns=self.layout.columns(row), where=self._where(place))
        except DataError as fault:
            raise DataError(f"{self._where(place)}: row {name!r}: {fault}") from None

    def _where(self, place: int) -> str:
        return f"{self.file}:{self._lines[place]}"

    def _row(self, place: int) -> dict:
        try:
            row = json.loads(self._content[self._starts[place] : self._ends[place]])
        except ValueError as fault:
            raise DataError(f"{self._where(place)}: not JSON: {fault}") from None
        if not isinstance(row, dict):
            raise DataError(f"{self._where(place)}: a row is a JSON object, got {type(row).__name__}")
        return row


def _mapped(file: Path) -> mmap.mmap:
    try:
        with file.open("rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as fault:
        raise DataError(f"{file} cannot be read: {fault.strerror}; check the path") from None
    except ValueError:
        raise DataError(f"{file} is empty; expected a JSON array of rows, or a row a line") from None


def _bounds(content: mmap.mmap, file: Path) -> Iterator[tuple[int, int, int]]:
    """First byte, byte after the last, and line of each row."""
    start = 3 if content[:3] == b"\xef\xbb\xbf" else 0  # the mark that some Windows editors write
    if re.compile(rb"\s*\[").match(content, start):
        yield from _bounds_in_array(content[start:], start, file)
        return
    line = 0
    while start < len(content):
        line += 1
        end = content.find(b"\n", start)
        end = len(content) if end < 0 else end
        if content[start:end].strip():
            yield start, end, line
        start = end + 1


def _bounds_in_array(content: bytes, start: int, file: Path) -> Iterator[tuple[int, int, int]]:
    """As `_bounds`; `content` begins at byte `start` of the file."""
    decode, blank = json.JSONDecoder().raw_decode, re.compile(r"\s*")
    line, done = 1, 0  # the line and, in characters, the place that `start` belongs to
    try:
        text = content.decode()
        place = text.index("[")
        while text[place : place + 1] in ("[", ","):
            first = blank.match(text, place + 1).end()
            if text[place] == "[" and text[first : first + 1] == "]":
                return
            _, last = decode(text, first)
            start, line = start + len(text[done:first].encode()), line + text.count("\n", done, first)
            end = start + len(text[first:last].encode())
            yield start, end, line
            start, line, done = end, line + text.count("\n", first, last), last
            place = blank.match(text, last).end()
        if text[place : place + 1] != "]":
            raise json.JSONDecodeError("expected , or ]", text, place)
    except json.JSONDecodeError as fault:
        raise DataError(f"{file}:{fault.lineno}: not JSON: {fault.msg}") from None
    except UnicodeDecodeError as fault:
        raise DataError(f"{file}: not UTF-8: {fault}; save it as UTF-8") from None
