"""`predictions.jsonl`: one answer a line, in the order of the dataset, merged from all ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwenvl_lit.atomic import atomic_file
from qwenvl_lit.types import DataError

FILENAME = "predictions.jsonl"


def rank_file(file: Path, rank: int | str) -> Path:
    """The file that `rank` appends to while it predicts, beside `file`; `*` for a glob pattern.

    >>> rank_file(Path("predictions.jsonl"), 1).name
    'predictions.rank1.jsonl'
    """
    return file.with_name(f"{file.stem}.rank{rank}{file.suffix}")


def merge_rank_files(files: Sequence[Path], target: Path) -> int:
    """Joins the files of all ranks into `target`, then removes them.

    Rows are sorted by set, in the order in which sets first appear, and index; each row once.

    Returns:
        The number of rows.

    Raises:
        FileNotFoundError: a rank's file is missing, as when ranks do not share a file system.
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
    """The rows that a run in `folder` has answered, by set and index, also if it was interrupted.

    Raises:
        DataError: the folder holds no predictions.
    """
    merged = folder / filename
    files = sorted(folder.glob(rank_file(merged, "*").name))
    if merged.exists():
        files.insert(0, merged)
    if not files:
        raise DataError(
            f"answered={folder}: there is no {filename} and no {rank_file(merged, 0).name}; "
            f"give the folder of a prediction"
        )
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for file in files:
        # Behind the last line break is nothing, or a line that a kill cut off.
        complete_lines = file.read_text(encoding="utf-8").split("\n")[:-1]
        for line in complete_lines:
            row = json.loads(line)
            rows.setdefault(row["set"], {})[row["index"]] = row
    return rows
