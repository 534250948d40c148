"""Cuts rows that are loaded together into batches that fit into memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from qwenvl_lit.data.collate import Pack, Pad
from qwenvl_lit.types import Batch, Dropped, Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationCosts:
    """The bytes that a micro-batch keeps for its backward pass, which grow with its contents."""

    per_token: float = 1.0  # of the text and of the images, padding included
    per_image_token: float = 0.0  # in addition, for what the vision tower keeps
    per_target: float = 0.0  # supervised token: the logits

    def of(self, *, tokens: int, image_tokens: int, targets: int) -> float:
        """Returns the bytes for these numbers of tokens."""
        text = self.per_token * tokens + self.per_target * targets
        return text + self.per_image_token * image_tokens


class BatchLimit:
    """The largest size of a batch. Data workers see when it is lowered."""

    def __init__(self, largest: float = math.inf):
        self._largest = torch.full((1,), largest, dtype=torch.float64, device="cpu").share_memory_()

    @property
    def largest(self) -> float:
        return self._largest.item()

    def lower(self, largest: float) -> None:
        self._largest.fill_(largest)


@dataclass(frozen=True, kw_only=True, slots=True)
class CutRows:
    """Collates rows that are evaluated together into batches, in order.

    Args:
        limit: the most rows of a batch.
        options_apart: whether rows with options and rows without are in separate batches, because
            they are answered in different ways.
    """

    pad: Pad
    limit: BatchLimit
    options_apart: bool

    def __call__(self, rows: Sequence[Sample | Dropped]) -> list[Batch]:
        dropped = [row for row in rows if isinstance(row, Dropped)]
        groups: list[list[Sample]] = []
        for row in rows:
            if isinstance(row, Dropped):
                continue
            if groups and self._belongs(row, groups[-1]):
                groups[-1].append(row)
            else:
                groups.append([row])
        first, *others = groups or [[]]
        return [self.pad([*first, *dropped]), *map(self.pad, others)]

    def _belongs(self, sample: Sample, group: Sequence[Sample]) -> bool:
        if len(group) >= self.limit.largest:
            return False
        if not self.options_apart:
            return True
        return bool(sample.conversation.options) == bool(group[0].conversation.options)


@dataclass(frozen=True, kw_only=True, slots=True)
class CutStep:
    """Collates the rows of an optimizer step into micro-batches, the largest first.

    Without a limit there is one micro-batch. Rows are packed with `pack`, which leaves no padding.
    Otherwise rows of similar length are padded together.

    Args:
        limit: the most activation bytes of a micro-batch.
        count: number of micro-batches of every step. FSDP needs the same number on all ranks. By
            default, there are as few as the limit allows.
        most_tokens: roughly the most tokens of a micro-batch, to be printed; None if the limit
            allows all rows of every step.
    """

    pad: Pad
    pack: Pack | None = None
    costs: ActivationCosts = field(default_factory=ActivationCosts)
    limit: BatchLimit = field(default_factory=BatchLimit)
    count: int | None = None
    most_tokens: int | None = None

    def __call__(self, rows: Sequence[Sample | Dropped]) -> list[Batch]:
        samples = [row for row in rows if isinstance(row, Sample)]
        dropped = [row for row in rows if isinstance(row, Dropped)]
        samples.sort(key=lambda sample: -len(sample.input_ids))  # stable
        if self.count is not None:
            groups = self._dealt(samples, self.count)
        else:
            groups = self._padded(samples) if self.pack is None else self._packed(samples)
        collate = self.pack or self.pad
        first, *others = groups or [[]]
        return [collate([*first, *dropped]), *map(collate, others)]

    def cost(self, samples: Sequence[Sample]) -> float:
        """Returns the activation bytes of a micro-batch."""
        lengths = [len(sample.input_ids) for sample in samples]
        if self.pack is None:
            tokens = len(lengths) * max(lengths, default=0)
        else:
            tokens = self.pack.width(sum(lengths))
        return self.costs.of(
            tokens=tokens,
            image_tokens=sum(len(sample.vision_positions) for sample in samples),
            targets=sum(int((sample.labels >= 0).sum()) for sample in samples),
        )

    def fits(self, micro_batches: Sequence[Batch]) -> bool:
        """Returns whether no micro-batch of several rows exceeds the limit.

        A fixed number of micro-batches cannot be cut otherwise.
        """
        if self.count is not None:
            return True
        several = [batch for batch in micro_batches if len(batch.conversations) > 1]
        return all(self._batch_cost(batch) <= self.limit.largest for batch in several)

    def halve(self, micro_batches: Sequence[Batch]) -> bool:
        """Lowers the limit after these micro-batches have exceeded the memory of the GPU.

        Returns:
            Whether that changes anything: False if each of them has one row already.
        """
        if max(len(batch.conversations) for batch in micro_batches) < 2:
            return False
        self.limit.lower(max(map(self._batch_cost, micro_batches)) / 2)
        return True

    def _batch_cost(self, batch: Batch) -> float:
        return self.costs.of(
            tokens=batch.input_ids.numel(),
            image_tokens=len(batch.vision_positions),
            targets=len(batch.target_positions),
        )

    def _packed(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """Balances the samples over the fewest groups within the limit."""
        limit = self.limit.largest
        for count in range(1, len(samples)):
            groups = self._dealt(samples, count)
            if max(map(self.cost, groups)) <= limit:
                return groups
        return [[sample] for sample in samples]

    def _padded(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """Fills groups with samples of decreasing length, up to the limit."""
        groups: list[list[Sample]] = []
        for sample in samples:
            if groups and self.cost([*groups[-1], sample]) <= self.limit.largest:
                groups[-1].append(sample)
            else:
                groups.append([sample])
        return groups

    def _dealt(self, samples: Sequence[Sample], count: int) -> list[list[Sample]]:
        """Deals the samples to `count` groups, each to the group of the lowest cost so far."""
        groups: list[list[Sample]] = [[] for _ in range(count)]
        totals = [0.0] * count
        for sample in samples:
            lightest = totals.index(min(totals))
            groups[lightest].append(sample)
            totals[lightest] += self.cost([sample]) or 1.0
        return groups
