"""Setting validation rows aside, once: a run remembers them by index and id, and they are never drawn again."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from qwenvl_lit.types import Conversation, DataError


@dataclass(frozen=True, slots=True)
class Chosen(Sequence[Conversation]):
    """Some rows of a source, in the order of `indices`."""

    rows: Sequence[Conversation]
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Conversation:
        return self.rows[self.indices[place]]


@dataclass(frozen=True, slots=True)
class Joined(Sequence[Conversation]):
    """Several sources one after the other."""

    sources: Sequence[Sequence[Conversation]]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, place: int) -> Conversation:
        for rows in self.sources:
            if place < len(rows):
                return rows[place]
            place -= len(rows)
        raise IndexError(place)


def hold_out(
    sources: Sequence[Sequence[Conversation]], amount: int | float, *, seed: int, file: Path | None
) -> tuple[list[Sequence[Conversation]], Sequence[Conversation]]:
    """The sources without the rows held out, and these rows.

    Args:
        amount: how many rows (1 or more), or which share of them (below 1; at least one row).
        file: where the choice is written; an existing one is obeyed, whatever `amount` and `seed` say.

    Raises:
        DataError: `amount` leaves nothing to train on, or the rows are no longer those that `file` names.
    """
    joined = Joined(sources)
    held = _remembered(joined, file) if file and file.exists() else _drawn(joined, amount, seed)
    if file and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"rows": len(joined), "validation": {str(i): joined[i].id for i in held}}, indent=0))
    chosen = set(held)
    starts = [0, *accumulate(map(len, sources))]
    rest = [Chosen(rows, [i for i in range(len(rows)) if start + i not in chosen]) for rows, start in zip(sources, starts, strict=False)]
    return rest, Chosen(joined, held)


def _drawn(rows: Sequence[Conversation], amount: int | float, seed: int) -> list[int]:
    count = max(1, int(amount * len(rows))) if amount < 1 else int(amount)
    if not 0 < count < len(rows):
        raise DataError(f"data.validation={amount} takes {count} of {len(rows)} rows; leave some to train on")
    return sorted(random.Random(seed).sample(range(len(rows)), count))


def _remembered(rows: Sequence[Conversation], file: Path) -> list[int]:
    split = json.loads(file.read_text())
    if split["rows"] != len(rows):
        raise DataError(
            f"{file}: the split was made over {split['rows']} rows, the data has {len(rows)} now; give the data it was made with"
        )
    for index, name in split["validation"].items():
        if rows[int(index)].id != name:
            raise DataError(f"{file}: row {index} was {name!r} and is {rows[int(index)].id!r} now; give the data it was made with")
    return [int(index) for index in split["validation"]]
