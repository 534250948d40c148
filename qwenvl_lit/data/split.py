"""Holds validation rows out of the training rows.

They are drawn once: a run remembers them by index and id, and uses the same rows ever after.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from qwenvl_lit.atomic import atomic_file, write_text
from qwenvl_lit.data.selection import Concat, Rows, Subset
from qwenvl_lit.stored_files import read_json_object
from qwenvl_lit.terminal import counted
from qwenvl_lit.types import DataError

ENTRY = re.compile(r'"(\d{1,18})": ("(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*")')
FEW_ROWS = 10
log = logging.getLogger(__name__)


class _DamagedError(DataError):
    """A split file that is not what was written."""


class NothingToTrainOnError(DataError):
    """All rows would be held out."""


def hold_out(
    sources: Sequence[Rows], amount: int | float, *, seed: int, file: Path | None
) -> tuple[list[Rows], Rows]:
    """Returns the sources without the held-out rows, and the held-out rows.

    No source may contain a row twice: the second one would stay in the training rows.

    Args:
        amount: number of rows (1 or more), or their share (below 1; at least one row is taken).
        file: where the split is written. If it exists, it decides, and `amount` and `seed` are
            ignored. If it is damaged, it is restored or refused.

    Raises:
        NothingToTrainOnError: `amount` leaves nothing to train on.
        DataError: the rows are not those that `file` names, or `file` is damaged beyond restoring.
    """
    rows = Concat(sources)
    if file and file.exists():
        try:
            held = _read_split(rows, file)
        except _DamagedError as damage:
            held = _restore_split(rows, amount, seed, file, damage)
    else:
        held = _draw(rows, amount, seed)
        if amount < 1 and len(held) < FEW_ROWS:
            _warn_of_few_rows(amount, len(held), len(rows))
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
        raise NothingToTrainOnError(
            f"data.validation={amount} takes {count} of {counted(len(rows), 'row')}; leave some to "
            f"train on, or set data.validation=null to train without validation"
        )
    return sorted(random.Random(seed).sample(range(len(rows)), count))


def _warn_of_few_rows(share: float, held_out: int, rows: int) -> None:
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    more = f"data.validation={rows // 5} holds out a fifth, and " if rows >= 5 * FEW_ROWS else ""
    log.warning(
        "data.validation=%s holds out %d of %s, too few for a reliable validation loss; "
        "%sdata.validation=FILE names rows of their own",
        *(share, held_out, counted(rows, "row"), more),
    )


def _write_split(rows: Rows, held: Sequence[int], file: Path) -> None:
    ids = {str(index): rows[index].id for index in held}
    file.parent.mkdir(parents=True, exist_ok=True)
    split = json.dumps({"rows": len(rows), "validation": ids}, indent=0)
    # Every rank writes the same split.
    with atomic_file(file, concurrent=True, durable=True) as unfinished:
        unfinished.write_text(split, encoding="utf-8")


def _read_split(rows: Rows, file: Path) -> list[int]:
    """Reads the held-out rows.

    Raises:
        _DamagedError: `file` is not what `_write_split` writes.
        DataError: the data is not that of the split.
    """
    try:
        split = read_json_object(file)
    except DataError as error:
        raise _DamagedError(str(error)) from error
    count, ids = split.get("rows"), split.get("validation")
    if not isinstance(count, int) or not isinstance(ids, dict):
        raise _DamagedError(
            f"{file} cannot be read: expected rows and validation, found {sorted(split)}"
        )
    if count != len(rows):
        raise DataError(
            f"{file}: the split was made of {counted(count, 'row')}, the data has {len(rows)} now; "
            "give the data it was made with"
        )
    held = []
    for key, row_id in ids.items():
        if not (key.isascii() and key.isdigit() and int(key) < count):
            raise _DamagedError(f"{file} cannot be read: {key!r} is not the number of a row")
        index = int(key)
        if rows[index].id != row_id:
            raise DataError(
                f"{file}: row {index} was {row_id!r} and is {rows[index].id!r} now; "
                "give the data it was made with"
            )
        held.append(index)
    return held


def _restore_split(
    rows: Rows, amount: int | float, seed: int, file: Path, reason: _DamagedError
) -> list[int]:
    """Draws the rows of a damaged split again, if what is legible of it shows that they are those.

    Raises:
        DataError: nothing is legible, or the rows that would be drawn are others.
    """
    text = file.read_bytes().decode(errors="replace") if file.is_file() else ""
    legible = {int(key): json.loads(row_id) for key, row_id in ENTRY.findall(text)}
    held = _draw(rows, amount, seed)
    drawn = {index: rows[index].id for index in held}
    if not legible or not legible.items() <= drawn.items():
        raise DataError(
            f"{reason}. It names the rows held out for validation, which must stay the same: "
            "restore it from a copy, or, if the data and the settings of the run are unchanged, "
            f"remove it: data.validation={amount} and seed={seed} draw the same rows again"
        )
    aside = file.with_name(f"{file.name}.broken")
    write_text(aside, text, concurrent=True)
    _write_split(rows, held, file)
    log.warning(
        "%s. Its %d legible rows are those that data.validation=%s and seed=%d draw, so it is "
        "written again; the damaged file is now %s",
        *(reason, len(legible), amount, seed, aside.name),
    )
    return held
