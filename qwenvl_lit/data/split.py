"""Holds validation rows out of the training rows.

They are drawn once: a run remembers them by index and id, and uses the same rows ever after.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from qwenvl_lit.atomic import write_text
from qwenvl_lit.data.selection import Concat, Rows, Subset
from qwenvl_lit.types import DataError


def hold_out(
    sources: Sequence[Rows], amount: int | float, *, seed: int, file: Path | None
) -> tuple[list[Rows], Rows]:
    """Returns the sources without the held-out rows, and the held-out rows.

    No source may contain a row twice: the second one would stay in the training rows.

    Args:
        amount: number of rows (1 or more), or their share (below 1; at least one row is taken).
        file: where the split is written. If it exists, it decides, and `amount` and `seed` are
            ignored.

    Raises:
        DataError: `amount` leaves nothing to train on, or the rows are not those that `file` names.
    """
    rows = Concat(sources)
    if file and file.exists():
        held = _read_split(rows, file)
    else:
        held = _draw(rows, amount, seed)
        if file:
            _write_split(rows, held, file)
    kept = np.ones(len(rows), dtype=bool)
    kept[held] = False
    starts = [0, *accumulate(map(len, sources))]
    rest: list[Rows] = []
    for source, start in zip(sources, starts, strict=False):
        rest.append(Subset(source, np.flatnonzero(kept[start : start + len(source)])))
    return rest, Subset(rows, held)


def _draw(rows: Rows, amount: int | float, seed: int) -> list[int]:
    count = max(1, int(amount * len(rows))) if amount < 1 else int(amount)
    if not 0 < count < len(rows):
        raise DataError(
            f"data.validation={amount} takes {count} of {len(rows)} rows; leave some to train on"
        )
    return sorted(random.Random(seed).sample(range(len(rows)), count))


def _write_split(rows: Rows, held: Sequence[int], file: Path) -> None:
    ids = {str(index): rows[index].id for index in held}
    file.parent.mkdir(parents=True, exist_ok=True)
    split = json.dumps({"rows": len(rows), "validation": ids}, indent=0)
    write_text(file, split, concurrent=True)  # every rank writes the same split


def _read_split(rows: Rows, file: Path) -> list[int]:
    split = json.loads(file.read_text(encoding="utf-8"))
    if split["rows"] != len(rows):
        raise DataError(
            f"{file}: the split was made of {split['rows']} rows, the data has {len(rows)} now; "
            "give the data it was made with"
        )
    held = []
    for key, row_id in split["validation"].items():
        index = int(key)
        if rows[index].id != row_id:
            raise DataError(
                f"{file}: row {index} was {row_id!r} and is {rows[index].id!r} now; "
                "give the data it was made with"
            )
        held.append(index)
    return held
