"""Setting validation rows aside, once: a run remembers them by index and id, and they are never drawn again."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from qwenvl_lit.types import Conversation, DataError

Rows = Sequence[Conversation]


@dataclass(frozen=True, slots=True)
class Subset(Sequence[Conversation]):
    """Some rows of a source, in the order of `indices`."""

    rows: Rows
    indices: Sequence[int] | np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Conversation:
        return self.rows[int(self.indices[place])]


@dataclass(frozen=True, slots=True)
class Concat(Sequence[Conversation]):
    """Several sources one after the other."""

    sources: Sequence[Rows]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, place: int) -> Conversation:
        for rows in self.sources:
            if place < len(rows):
                return rows[place]
            place -= len(rows)
        raise IndexError(place)


def counted(source: str) -> tuple[str, int | None]:
    """The files that a source names, and how many of their rows; None for all.

    >>> counted("rows.jsonl#2000")
    ('rows.jsonl', 2000)
    """
    files, count = re.fullmatch(r"(.*?)(?:#(\d+))?", source, re.DOTALL).groups()
    return files, None if count is None else int(count)


def take(rows: Rows, count: int, seed: int = 0) -> Rows:
    """`count` rows: as many whole passes as fit in, then a random rest without repetition.

    >>> "".join(take("abc", 6))
    'abcabc'
    """
    if not count or not len(rows):
        return Subset(rows, [])
    passes, rest = divmod(count, len(rows))
    return Subset(
        rows,
        np.array([*range(len(rows))] * passes + random.Random(seed).sample(range(len(rows)), rest)),
    )


def places(rows: Rows) -> tuple[list[Rows], np.ndarray]:
    """What `rows` chooses from and joins in the end, and for each row its place in these, joined. A row that comes twice has one place.

    >>> places(Joined([Chosen("abc", [2, 2]), "de"]))
    (['abc', 'de'], array([2, 2, 3, 4]))
    """
    if isinstance(rows, Subset):
        bottoms, inner = places(rows.rows)
        return bottoms, inner[np.asarray(rows.indices, dtype=np.int64)]
    if not isinstance(rows, Concat):
        return [rows], np.arange(len(rows))
    bottoms, found = [], [np.empty(0, dtype=np.int64)]
    for part in rows.sources:
        below, inner = places(part)
        known = [
            next((k for k, other in enumerate(bottoms) if other is one), None) for one in below
        ]
        for k, one in enumerate(below):
            if known[k] is None:
                known[k] = len(bottoms)
                bottoms.append(one)
        own, all_ = (np.array([0, *accumulate(map(len, some))]) for some in (below, bottoms))
        which = np.searchsorted(own, inner, side="right") - 1
        found.append(inner - own[which] + all_[np.array(known, dtype=np.int64)[which]])
    return bottoms, np.concatenate(found)


def hold_out(
    sources: Sequence[Rows], amount: int | float, *, seed: int, file: Path | None
) -> tuple[list[Rows], Rows]:
    """The sources without the rows held out, and these rows. No source may have a row twice: a twin of a held-out row would stay.

    Args:
        amount: how many rows (1 or more), or which share of them (below 1; at least one row).
        file: where the choice is written; an existing one is obeyed, whatever `amount` and `seed` say.

    Raises:
        DataError: `amount` leaves nothing to train on, or the rows are no longer those that `file` names.
    """
    joined = Concat(sources)
    held = _remembered(joined, file) if file and file.exists() else _drawn(joined, amount, seed)
    if file and not file.exists():
        _remember(joined, held, file)
    kept = np.ones(len(joined), dtype=bool)
    kept[held] = False
    starts = [0, *accumulate(map(len, sources))]
    rest: list[Rows] = [
        Subset(rows, np.flatnonzero(kept[start : start + len(rows)]))
        for rows, start in zip(sources, starts, strict=False)
    ]
    return rest, Subset(joined, held)


def _drawn(rows: Rows, amount: int | float, seed: int) -> list[int]:
    count = max(1, int(amount * len(rows))) if amount < 1 else int(amount)
    if not 0 < count < len(rows):
        raise DataError(
            f"data.validation={amount} takes {count} of {len(rows)} rows; leave some to train on"
        )
    return sorted(random.Random(seed).sample(range(len(rows)), count))


def _remember(rows: Rows, held: Sequence[int], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    unfinished.write_text(
        json.dumps({"rows": len(rows), "validation": {str(i): rows[i].id for i in held}}, indent=0)
    )
    unfinished.replace(file)  # another rank sees all of it or nothing


def _remembered(rows: Rows, file: Path) -> list[int]:
    split = json.loads(file.read_text())
    if split["rows"] != len(rows):
        raise DataError(
            f"{file}: the split was made over {split['rows']} rows, the data has {len(rows)} now; give the data it was made with"
        )
    for index, name in split["validation"].items():
        if rows[int(index)].id != name:
            raise DataError(
                f"{file}: row {index} was {name!r} and is {rows[int(index)].id!r} now; give the data it was made with"
            )
    return [int(index) for index in split["validation"]]
