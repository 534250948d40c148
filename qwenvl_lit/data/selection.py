"""Subsets, concatenations and repetitions of rows, which do not copy any row."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from qwenvl_lit.types import Conversation

Rows = Sequence[Conversation]


@dataclass(frozen=True, slots=True)
class Subset(Sequence[Conversation]):
    """The rows at `indices`, in the order of `indices`. An index may occur several times."""

    rows: Rows
    indices: Sequence[int] | np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Conversation:
        return self.rows[int(self.indices[index])]


@dataclass(frozen=True, slots=True)
class Concat(Sequence[Conversation]):
    """The rows of several sources, one source after the other."""

    sources: Sequence[Rows]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, index: int) -> Conversation:
        for rows in self.sources:
            if index < len(rows):
                return rows[index]
            index -= len(rows)
        raise IndexError(index)


def parse_count(files: str) -> tuple[str, int | None]:
    """Splits `FILES#N` into `FILES` and the number of rows N, which is None for all rows.

    >>> parse_count("rows.jsonl#2000")
    ('rows.jsonl', 2000)
    """
    match = re.fullmatch(r"(.*?)(?:#(\d+))?", files, re.DOTALL)
    assert match is not None  # every string matches
    name, count = match.groups()
    return name, None if count is None else int(count)


def take(rows: Rows, count: int, seed: int = 0) -> Rows:
    """Returns `count` rows: all rows as often as possible, then random distinct rows.

    >>> "".join(take("abc", 6))
    'abcabc'
    """
    if not count or not len(rows):
        return Subset(rows, [])
    passes, rest = divmod(count, len(rows))
    repeated = [*range(len(rows))] * passes
    drawn = random.Random(seed).sample(range(len(rows)), rest)
    return Subset(rows, np.array(repeated + drawn))


def flatten(rows: Rows) -> tuple[list[Rows], np.ndarray]:
    """Resolves nested `Subset`s and `Concat`s.

    Returns:
        The distinct sources of the rows, and the index of each row in the concatenation of these
        sources. If a row occurs twice, its index occurs twice.

    >>> flatten(Concat([Subset("abc", [2, 2]), "de"]))
    (['abc', 'de'], array([2, 2, 3, 4]))
    """
    if isinstance(rows, Subset):
        sources, inner = flatten(rows.rows)
        return sources, inner[np.asarray(rows.indices, dtype=np.int64)]
    if not isinstance(rows, Concat):
        return [rows], np.arange(len(rows))
    sources, starts, end = [], {}, 0  # `starts` is keyed by the identity of a source
    indices = [np.empty(0, dtype=np.int64)]
    for nested in rows.sources:
        inner_sources, inner = flatten(nested)
        moved = [np.empty(0, dtype=np.int64)]
        for source in inner_sources:
            if id(source) not in starts:
                starts[id(source)] = end
                sources.append(source)
                end += len(source)
            moved.append(starts[id(source)] + np.arange(len(source)))
        indices.append(np.concatenate(moved)[inner])
    return sources, np.concatenate(indices)


def spread(sets: Sequence[Rows], count: int, seed: int = 0) -> list[int]:
    """Returns indices of `count` rows of the joined `sets`, in order.

    Each set gives as many rows as the others if it has them, and so does each file of a set. Within
    a file, the rows are drawn at random from sections of equal length.

    >>> len(spread(["abcdefghi", "j", "klmnopqrs"], 7))
    7
    """
    generator = random.Random(seed)
    chosen: list[int] = []
    start = 0
    for rows, share in zip(sets, _equal_shares(list(map(len, sets)), count), strict=True):
        sources, indices = flatten(rows)
        ends = np.cumsum(list(map(len, sources)))
        source_of_row = np.searchsorted(ends, indices, side="right")
        of_source = [np.flatnonzero(source_of_row == k) for k in range(len(sources))]
        shares = _equal_shares(list(map(len, of_source)), share)
        for positions, number in zip(of_source, shares, strict=True):
            bounds = [len(positions) * k // number for k in range(number + 1)] if number else []
            for first, end in pairwise(bounds):
                chosen.append(start + int(positions[generator.randrange(first, end)]))
        start += len(rows)
    return sorted(chosen)


def _equal_shares(sizes: Sequence[int], count: int) -> list[int]:
    """Divides `count` among groups of these sizes as equally as their sizes allow.

    With fewer than one for each, the groups that get one are spread over all groups.

    >>> _equal_shares([9, 1, 9], 7), _equal_shares([5, 5, 5, 5], 2)
    ([3, 1, 3], [1, 0, 1, 0])
    """
    shares = [0] * len(sizes)
    left = min(count, sum(sizes))
    while left:
        open_groups = [k for k, size in enumerate(sizes) if shares[k] < size]
        if left < len(open_groups):
            open_groups = [open_groups[len(open_groups) * k // left] for k in range(left)]
        for k in open_groups:
            more = min(max(1, left // len(open_groups)), sizes[k] - shares[k])
            shares[k] += more
        left = min(count, sum(sizes)) - sum(shares)
    return shares
