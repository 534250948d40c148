"""Which rows make up which batch: the same for the same seed, alike for all ranks, and to be taken up again at any batch."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import cycle, islice

import numpy as np
from torch.utils.data import Sampler

WINDOW = 64  # batches a rank of which the rows are sorted by length, or packed, together
Position = tuple[int, int]  # epoch, and how many of its batches are done


class BatchSampler(Sampler[list[int]]):
    """Batches of row numbers for one rank, an epoch at a time.

    Stages come one after the other, each shuffled anew every epoch; a batch has rows of one stage. All ranks get the same number of
    batches: where they do not divide evenly, the first of the epoch are repeated at its end. One process has every row exactly once.

    With `max_tokens` the rows of a batch stay together in every epoch, since the number of batches may not change; their order does.

    Args:
        stages: how many rows each stage has; they are numbered through.
        batch_size: rows of a batch without `max_tokens`; the last batch of a stage may have fewer.
        lengths: (rows,) tokens of each, needed by all that follows.
        group_by_length: rows of a batch, and batches of a step, are alike in length; still in random order.
        max_tokens: as many rows as fit in: the rows times the longest, or with `packing` their sum.
        packing: rows are put together so that their sum comes close to `max_tokens`.
        position: asked whenever an epoch is begun; by default the start of the epoch that `set_epoch` gave.

    Raises:
        ValueError: options that do not go together, or a row has more than `max_tokens`.
    """

    def __init__(
        self,
        stages: Sequence[int],
        *,
        batch_size: int = 1,
        lengths: np.ndarray | None = None,
        group_by_length: bool = False,
        max_tokens: int | None = None,
        packing: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        position: Callable[[], Position] | None = None,
    ):
        if packing and max_tokens is None:
            raise ValueError(
                "data.packing needs data.max_tokens: how many tokens a packed row has at most"
            )
        if lengths is None and (group_by_length or max_tokens is not None):
            raise ValueError(
                "grouping by length, and a budget of tokens, need the length of each row"
            )
        self.stages = stages
        self.batch_size = batch_size
        self.lengths = lengths
        self.group_by_length = group_by_length
        self.max_tokens = max_tokens
        self.packing = packing
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.position = position or (lambda: (self.epoch, 0))
        if (
            max_tokens is not None
            and lengths is not None
            and len(lengths)
            and lengths.max() > max_tokens
        ):
            raise ValueError(
                f"row {lengths.argmax()} has {lengths.max()} tokens, more than max_tokens={max_tokens}"
            )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches a rank and epoch."""
        each = (
            (-(-rows // self.batch_size) for rows in self.stages)
            if self.max_tokens is None
            else map(len, self._fixed)
        )
        return -(-sum(each) // self.world_size)

    @property
    def max_rows(self) -> int:
        """No batch has more rows."""
        return (
            self.batch_size
            if self.max_tokens is None
            else max((len(batch) for stage in self._fixed for batch in stage), default=0)
        )

    def __iter__(self) -> Iterator[list[int]]:
        epoch, done = self.position()
        batches = self._of_all_ranks(epoch)
        every = len(self) * self.world_size
        return (
            batch.tolist()
            for batch in islice(
                cycle(batches), self.rank + done * self.world_size, every, self.world_size
            )
        )

    def _of_all_ranks(self, epoch: int) -> list[np.ndarray]:
        draw = np.random.default_rng((self.seed, epoch))
        if self.max_tokens is not None:
            return [batch for stage in self._fixed for batch in self._shuffled(stage, draw)]
        batches = []
        for rows in self._orders(draw):
            for window in self._windows(rows, self.batch_size) if self.group_by_length else [rows]:
                cut = [
                    window[start : start + self.batch_size]
                    for start in range(0, len(window), self.batch_size)
                ]
                batches += self._shuffled(cut, draw) if self.group_by_length else cut
        return batches

    @cached_property
    def _fixed(self) -> list[list[np.ndarray]]:
        """The batches of each stage within `max_tokens`."""
        draw, typical = (
            np.random.default_rng(self.seed),
            self.max_tokens // max(1, int(self.lengths.mean())) if len(self.lengths) else 1,
        )
        stages = []
        for rows in self._orders(draw):
            stage: list[np.ndarray] = []
            for window in (
                self._windows(rows, max(1, typical))
                if self.group_by_length or self.packing
                else [rows]
            ):
                stage += (
                    _packed(window, self.lengths, self.max_tokens)
                    if self.packing
                    else _filled(window, self.lengths, self.max_tokens)
                )
            stages.append(stage)
        return stages

    def _orders(self, draw: np.random.Generator) -> Iterator[np.ndarray]:
        start = 0
        for rows in self.stages:
            yield draw.permutation(rows) + start
            start += rows

    def _windows(self, rows: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
        """Consecutive runs of `rows`, each from the longest to the shortest."""
        size = WINDOW * self.world_size * batch_size
        for start in range(0, len(rows), size):
            window = rows[start : start + size]
            yield window[np.argsort(-self.lengths[window], kind="stable")]

    def _shuffled(self, batches: list[np.ndarray], draw: np.random.Generator) -> list[np.ndarray]:
        """In another order; those that the ranks take in one step stay together."""
        steps = [
            batches[start : start + self.world_size]
            for start in range(0, len(batches), self.world_size)
        ]
        whole = [steps[place] for place in draw.permutation(len(batches) // self.world_size)]
        return [batch for step in [*whole, *steps[len(whole) :]] for batch in step]


def _filled(rows: np.ndarray, lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Consecutive runs of `rows` that have at most `max_tokens` when padded to their longest."""
    batches, start, longest = [], 0, 0
    for place, length in enumerate(lengths[rows].tolist()):
        longest = max(longest, length)
        if longest * (place + 1 - start) > max_tokens:
            batches.append(rows[start:place])
            start, longest = place, length
    return [*batches, rows[start:]] if start < len(rows) else batches


def _packed(rows: np.ndarray, lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """`rows`, from the longest to the shortest, each put where it leaves the least room (best fit)."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for row in rows.tolist():
        length = int(lengths[row])
        place = bisect_left(room, (length, -1))
        if place < len(room):
            left, chosen = room.pop(place)
            bins[chosen].append(row)
        else:
            left, chosen = max_tokens, len(bins)
            bins.append([row])
        insort(room, (left - length, chosen))
    return [np.array(rows) for rows in bins]
