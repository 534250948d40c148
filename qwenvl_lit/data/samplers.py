"""A deterministic batch sampler: seeded, the same on all ranks, resumable at any batch."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import cycle, islice

import numpy as np
from torch.utils.data import Sampler

WINDOW = 64  # batches per rank whose rows are sorted by length, or packed, together
Position = tuple[int, int]  # epoch, and the number of its batches that are done


class BatchSampler(Sampler[list[int]]):
    """Yields the batches of one rank as lists of row indices, one epoch per iteration.

    Stages follow each other; each is shuffled anew every epoch, and a batch has rows of one stage.
    All ranks get the same number of batches: if they do not divide evenly, the first batches of the
    epoch are repeated at its end. A single process gets every row exactly once.

    With `max_tokens` the same rows form a batch in every epoch, since the number of batches may not
    change; only the order of the batches is shuffled.

    Args:
        stages: number of rows of each stage. Row indices run over all stages.
        batch_size: rows per batch without `max_tokens`; the last batch of a stage may have fewer.
        lengths: (rows,) tokens of each row; required by the options below.
        group_by_length: rows of a batch, and batches of a step, have similar lengths. The order of
            the batches stays random.
        max_tokens: most tokens of a batch: number of rows times the longest, or with `packing` the
            sum of the lengths.
        packing: choose the rows of a batch so that the sum of their lengths is close to
            `max_tokens`.
        batches_per_step: consecutive batches of a rank that are joined and yielded as one. The
            last one of an epoch may have fewer.
        position: returns where an epoch starts, called at the start of each iteration. By default
            the epoch given to `set_epoch` starts at its first batch.

    Raises:
        ValueError: an option lacks one that it requires, or a row has more than `max_tokens`.
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
        batches_per_step: int = 1,
        position: Callable[[], Position] | None = None,
    ):
        if packing and max_tokens is None:
            raise ValueError("data.packing needs data.max_tokens, the most tokens of a packed row")
        if lengths is None and (group_by_length or max_tokens is not None):
            raise ValueError("group_by_length and max_tokens need the length of each row")
        if max_tokens is not None and len(lengths) and lengths.max() > max_tokens:
            raise ValueError(
                f"row {lengths.argmax()} has {lengths.max()} tokens, "
                f"more than max_tokens={max_tokens}"
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
        self.batches_per_step = batches_per_step
        self.epoch = 0
        self.position = position or (lambda: (self.epoch, 0))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of yielded batches per rank and epoch."""
        return -(-self._batches_per_rank // self.batches_per_step)

    @property
    def _batches_per_rank(self) -> int:
        if self.max_tokens is None:
            batches = sum(-(-rows // self.batch_size) for rows in self.stages)
        else:
            batches = sum(map(len, self._fixed_batches))
        return -(-batches // self.world_size)

    @property
    def max_rows(self) -> int:
        """Upper bound on the rows of a batch."""
        if self.max_tokens is None:
            return self.batch_size
        sizes = (len(batch) for stage in self._fixed_batches for batch in stage)
        return max(sizes, default=0)

    def __iter__(self) -> Iterator[list[int]]:
        # Not a generator: the position is read now, not when the first batch is fetched.
        epoch, done = self.position()
        batches = cycle(self._epoch_batches(epoch))
        first = self.rank + done * self.batches_per_step * self.world_size
        stop = self._batches_per_rank * self.world_size
        of_rank = islice(batches, first, stop, self.world_size)
        joined = iter(lambda: list(islice(of_rank, self.batches_per_step)), [])
        return (np.concatenate(step).tolist() for step in joined)

    def _epoch_batches(self, epoch: int) -> list[np.ndarray]:
        """Returns the batches of all ranks: batch k belongs to rank k modulo `world_size`."""
        generator = np.random.default_rng((self.seed, epoch))
        batches: list[np.ndarray] = []
        if self.max_tokens is not None:
            for stage in self._fixed_batches:
                batches += self._shuffle_steps(stage, generator)
            return batches
        for rows in self._shuffled_stages(generator):
            if not self.group_by_length:
                batches += _cut(rows, self.batch_size)
                continue
            for window in self._sorted_windows(rows, self.batch_size):
                batches += self._shuffle_steps(_cut(window, self.batch_size), generator)
        return batches

    @cached_property
    def _fixed_batches(self) -> list[list[np.ndarray]]:
        """The batches of each stage with `max_tokens`, before their order is shuffled."""
        generator = np.random.default_rng(self.seed)
        fill = _pack if self.packing else _fill
        stages = []
        for rows in self._shuffled_stages(generator):
            stage: list[np.ndarray] = []
            for window in self._budget_windows(rows):
                stage += fill(window, self.lengths, self.max_tokens)
            stages.append(stage)
        return stages

    def _budget_windows(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        if not (self.group_by_length or self.packing):
            yield rows
        elif len(rows):
            typical_size = self.max_tokens // max(1, int(self.lengths.mean()))
            yield from self._sorted_windows(rows, max(1, typical_size))

    def _shuffled_stages(self, generator: np.random.Generator) -> Iterator[np.ndarray]:
        start = 0
        for rows in self.stages:
            yield generator.permutation(rows) + start
            start += rows

    def _sorted_windows(self, rows: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
        """Yields consecutive pieces of `rows`, each sorted from the longest row to the shortest."""
        for window in _cut(rows, WINDOW * self.world_size * batch_size):
            yield window[np.argsort(-self.lengths[window], kind="stable")]

    def _shuffle_steps(
        self, batches: list[np.ndarray], generator: np.random.Generator
    ) -> list[np.ndarray]:
        """Shuffles `batches`; those that the ranks train on in one step stay together.

        An incomplete step stays at the end.
        """
        whole_steps = len(batches) // self.world_size
        shuffled: list[np.ndarray] = []
        for step in generator.permutation(whole_steps):
            start = step * self.world_size
            shuffled += batches[start : start + self.world_size]
        return shuffled + batches[whole_steps * self.world_size :]


def _cut(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Splits `rows` into consecutive pieces of `size` rows; the last one may be shorter."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _fill(rows: np.ndarray, lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Splits `rows` into consecutive batches of at most `max_tokens`, padding included."""
    batches: list[np.ndarray] = []
    start, longest = 0, 0
    for stop, length in enumerate(lengths[rows].tolist()):
        longest = max(longest, length)
        if longest * (stop + 1 - start) > max_tokens:
            batches.append(rows[start:stop])
            start, longest = stop, length
    if start < len(rows):
        batches.append(rows[start:])
    return batches


def _pack(rows: np.ndarray, lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Puts each row, from the longest to the shortest, into the fullest batch that can hold it.

    This is best-fit decreasing bin packing; `rows` are sorted by length already.
    """
    batches: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, batch), sorted
    for row in rows.tolist():
        length = int(lengths[row])
        fullest = bisect_left(free, (length, -1))
        if fullest < len(free):
            left, batch = free.pop(fullest)
            batches[batch].append(row)
        else:
            left, batch = max_tokens, len(batches)
            batches.append([row])
        insort(free, (left - length, batch))
    return [np.array(batch) for batch in batches]
