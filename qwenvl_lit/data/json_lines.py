"""Reads and writes the JSON Lines files of the package.

A line ends at a line feed and nowhere else. Text may hold U+2028, U+2029 or U+0085, at which
`str.splitlines` splits, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qwenvl_lit.types import DataError


def append_json_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends a line for each row; the folder is made if it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # Half of a surrogate pair, as in a file name that is not UTF-8, becomes its JSON escape.
    with file.open("a", encoding="utf-8", errors="backslashreplace") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_json_lines(file: Path, *, unfinished: bool = False) -> Iterator[tuple[int, Any]]:
    """Yields the number and the value of each line that is not blank.

    Args:
        unfinished: the process that wrote the file may have been killed: what follows the last line
            feed is left out.

    Raises:
        DataError: the file cannot be read, or a line is not JSON.
    """
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip() or (unfinished and not line.endswith(b"\n")):
                    continue
                yield number, _parsed(line, f"{file}:{number}")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from None


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode())
    except RecursionError:
        raise DataError(f"{where}: not JSON: it is nested too deeply") from None
    except ValueError as error:  # also if it is not UTF-8
        raise DataError(f"{where}: not JSON: {error}; is the file damaged?") from None
