"""`predictions.jsonl`: one answer per line, in the order of the dataset, merged from all ranks."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_lit.atomic import atomic_file
from qwenvl_lit.data.json_lines import read_json_lines
from qwenvl_lit.types import DataError

if TYPE_CHECKING:
    from qwenvl_lit.data.selection import Rows

FILENAME = "predictions.jsonl"
_REPR = reprlib.Repr()
_REPR.maxdict = _REPR.maxstring = 60
_short = _REPR.repr


def rank_file(file: Path, rank: int | str) -> Path:
    """Returns the file beside `file` that a rank appends to; with `*`, the pattern of all of them.

    >>> rank_file(Path("predictions.jsonl"), 1).name
    'predictions.rank1.jsonl'
    """
    return file.with_name(f"{file.stem}.rank{rank}{file.suffix}")


def merge_rank_files(files: Sequence[Path], target: Path) -> int:
    """Merges the files of all ranks into `target`, and removes them.

    Rows are sorted by set, in the order in which sets first appear, and by index. A row that occurs
    several times is written once.

    Returns:
        The number of rows.

    Raises:
        FileNotFoundError: the file of a rank is missing, for example because the ranks do not
            share a file system.
    """
    lines: dict[tuple[int, int], str] = {}
    set_order: dict[str, int] = {}
    for file in files:
        with file.open(encoding="utf-8") as stream:
            for line in stream:
                row = json.loads(line)
                set_index = set_order.setdefault(row["set"], len(set_order))
                lines[set_index, row["index"]] = line
    with atomic_file(target) as unfinished, unfinished.open("w", encoding="utf-8") as stream:
        stream.writelines(lines[key] for key in sorted(lines))
    for file in files:
        file.unlink()
    return len(lines)


def answered_rows(folder: Path, filename: str = FILENAME) -> dict[str, dict[int, dict[str, Any]]]:
    """Returns the rows that a run in `folder` has answered, by set and index.

    The run may have been interrupted.

    Raises:
        DataError: the folder holds no predictions, or as `prediction_rows`.
    """
    merged = folder / filename
    files = sorted(folder.glob(rank_file(merged, "*").name))
    if merged.exists():
        files.insert(0, merged)
    if not files:
        raise DataError(
            f"answered={folder}: there is no {filename} and no {rank_file(merged, 0).name}; "
            "give the folder of a run of predict"
        )
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for file in files:
        for row in prediction_rows(file, unfinished=True):
            rows.setdefault(row["set"], {})[row["index"]] = row
    return rows


def prediction_rows(file: Path, *, unfinished: bool = False) -> Iterator[dict[str, Any]]:
    """Yields the rows of a predictions file.

    Args:
        unfinished: as for `read_json_lines`.

    Raises:
        DataError: the file cannot be read, or a line is not a prediction.
    """
    for number, row in read_json_lines(file, unfinished=unfinished):
        if not _is_prediction(row):
            raise DataError(
                f"{file}:{number}: expected {{set, index, id, prediction}} as `predict` writes "
                f"them, with an index that is 0 or more and text otherwise; got {_short(row)}"
            )
        yield row


def _is_prediction(row: Any) -> bool:
    if not isinstance(row, dict) or type(row.get("index")) is not int or row["index"] < 0:
        return False
    return all(isinstance(row.get(key), str) for key in ("set", "id", "prediction"))


def unanswered(name: str, rows: Rows, answered: Mapping[int, str]) -> list[int]:
    """Returns the indices of the rows of set `name` that an earlier run has not answered.

    Args:
        answered: index and id of the rows that it has answered.

    Raises:
        DataError: `rows` are not the rows that were answered.
    """
    for index, row_id in answered.items():
        if index >= len(rows):
            found = "does not exist"
        elif rows[index].id != row_id:
            found = f"is {rows[index].id!r}"
        else:
            continue
        raise DataError(
            f"answered: its row {index} of {name} is {row_id!r}, which {found} now; "
            "do these answers belong to other data?"
        )
    return [index for index in range(len(rows)) if index not in answered]
