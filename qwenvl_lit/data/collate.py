"""Collates samples into batches.

Positions become flat indices here, in the data worker, so that no training step searches for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import torch

from qwenvl_lit.types import Batch, DataError, Dropped, ImageSource, Sample

if TYPE_CHECKING:
    from qwenvl_lit.models.protocols import Processor

IGNORED = -100  # label of a token that is not supervised
TILE = 64  # tokens; matmul kernels are fastest for multiples of it

CollateVision = Callable[[Sequence[Sample]], Mapping[str, Any]]  # `Processor.collate_vision`


@dataclass(frozen=True, kw_only=True, slots=True)
class Pad:
    """Makes one row of each sample, padded to the longest; dropped rows are left out.

    The width of the rows is a multiple of `multiple_of`.

    Training pads on the right, generation on the left. A batch whose rows were all dropped is an
    `empty_batch`.

    >>> pad = Pad(pad_id=0, collate_vision=processor.collate_vision, side="left")  # doctest: +SKIP
    >>> pad([sample_of_2, sample_of_3]).attention_mask  # doctest: +SKIP
    tensor([[0, 1, 1], [1, 1, 1]])
    """

    pad_id: int
    collate_vision: CollateVision = field(repr=False)
    side: Literal["left", "right"] = "right"
    multiple_of: int = 1

    def __call__(self, rows: Sequence[Sample | Dropped]) -> Batch:
        samples, dropped = _separate(rows)
        if not samples:
            return empty_batch(self.pad_id, dropped)
        lengths = tuple(len(sample.input_ids) for sample in samples)
        width = -(-max(lengths) // self.multiple_of) * self.multiple_of
        input_ids = torch.full((len(samples), width), self.pad_id)
        labels = torch.full_like(input_ids, IGNORED)
        attention_mask = torch.zeros_like(input_ids)
        vision_positions, starts = [], []
        for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
            start = width - length if self.side == "left" else 0
            stop = start + length
            input_ids[row, start:stop] = sample.input_ids
            labels[row, start:stop] = sample.labels
            attention_mask[row, start:stop] = 1
            starts.append(row * width + start)
            vision_positions.append(sample.vision_positions + starts[-1])
        axis_positions = _join_positions(samples, starts, input_ids.numel())
        if axis_positions is not None:
            axis_positions = axis_positions.view(-1, *input_ids.shape)
        return Batch(
            conversations=tuple(sample.conversation for sample in samples),
            input_ids=input_ids,
            labels=labels,
            attention_mask=attention_mask,
            position_ids=None,
            lengths=lengths,
            vision_positions=torch.cat(vision_positions),
            target_positions=target_positions(labels),
            vision=self.collate_vision(samples),
            axis_positions=axis_positions,
            images=_images_of(samples),
            dropped=dropped,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """Packs all samples into one row; dropped rows are left out.

    Position ids restart with each sample, and no sample attends to another. A batch whose rows were
    all dropped is all padding: the step is made, and no other rank blocks.

    With `max_tokens`, the row is padded to this length. Otherwise it is padded to a multiple of
    `TILE`. The bounds have the same shape for all batches, so that code is compiled once.

    >>> pack = Pack(pad_id=0, collate_vision=processor.collate_vision,
    ...             max_tokens=6, max_rows=2, longest=3)  # doctest: +SKIP
    >>> batch = pack([sample_of_2, sample_of_3])  # doctest: +SKIP
    >>> batch.position_ids, batch.segment_bounds  # doctest: +SKIP
    (tensor([[0, 1, 0, 1, 2, 0]]), tensor([0, 2, 5, 6, 6, 6]))

    Args:
        max_rows: most samples of a batch.
        longest: most tokens of a sample, and of a segment of padding.
        max_tokens: the length of the row, or None.

    Raises:
        DataError: the samples exceed one of the limits, although their rows were measured.
    """

    pad_id: int
    collate_vision: CollateVision = field(repr=False)
    max_rows: int
    longest: int
    max_tokens: int | None = None

    def __call__(self, rows: Sequence[Sample | Dropped]) -> Batch:
        samples, dropped = _separate(rows)
        lengths = tuple(len(sample.input_ids) for sample in samples)
        self._check(lengths)
        *starts, end = accumulate(lengths, initial=0)
        padding = self.width(end) - end
        input_ids, label_parts, position_ids = [], [], []
        vision_positions = [torch.empty(0, dtype=torch.int64)]  # for a batch without samples
        for sample, start, length in zip(samples, starts, lengths, strict=True):
            input_ids.append(sample.input_ids)
            label_parts.append(sample.labels)
            position_ids.append(torch.arange(length))
            vision_positions.append(sample.vision_positions + start)
        input_ids.append(torch.full((padding,), self.pad_id))
        label_parts.append(torch.full((padding,), IGNORED))
        position_ids.append(torch.zeros(padding, dtype=torch.int64))
        labels = torch.cat(label_parts)
        labels[starts] = IGNORED  # otherwise the sample before would learn to predict these tokens
        axis_positions = _join_positions(samples, starts, len(labels))
        if axis_positions is not None:
            axis_positions = axis_positions[:, None]
        return Batch(
            conversations=tuple(sample.conversation for sample in samples),
            input_ids=torch.cat(input_ids)[None],
            labels=labels[None],
            attention_mask=None,
            position_ids=torch.cat(position_ids)[None],
            lengths=lengths,
            vision_positions=torch.cat(vision_positions),
            target_positions=target_positions(labels[None]),
            vision=self.collate_vision(samples) if samples else {},
            axis_positions=axis_positions,
            images=_images_of(samples),
            dropped=dropped,
            segment_bounds=self._segment_bounds(lengths),
            longest_segment=self.longest,
        )

    def width(self, tokens: int) -> int:
        """Returns the length of the row that holds `tokens` tokens."""
        return self.max_tokens or max(TILE, -(-tokens // TILE) * TILE)

    def _check(self, lengths: Sequence[int]) -> None:
        tokens, longest = sum(lengths), max(lengths, default=0)
        too_many = tokens > self.width(tokens) or len(lengths) > self.max_rows
        if too_many or longest > self.longest:
            raise DataError(
                f"{len(lengths)} samples of {tokens} tokens, the longest of {longest}, "
                f"do not fit into {self}: were images replaced by larger ones after their rows "
                "were measured? Delete the folder `lengths` in paths.cache to measure again"
            )

    def _segment_bounds(self, lengths: Sequence[int]) -> torch.Tensor:
        """Returns the cumulative lengths of the segments, whose number is the same for all batches.

        The padding is cut into segments of at most `longest` tokens. Empty segments follow.
        """
        padding = self.width(sum(lengths)) - sum(lengths)
        segments = [*lengths, *[self.longest] * (padding // self.longest), padding % self.longest]
        most_segments = self.max_rows + (self.max_tokens or TILE) // self.longest + 1
        empty = [0] * (most_segments - len(segments))
        return torch.tensor([0, *segments, *empty]).cumsum(0, dtype=torch.int32)


def check_packing(processor: Processor, max_tokens: int | None) -> None:
    """Raises a ValueError unless rows can be packed into rows of `max_tokens` for this model."""
    if max_tokens is None:
        raise ValueError(
            "data.packing=true needs the most tokens of a packed row, say data.max_tokens=8192"
        )
    if not processor.supports_packing:
        family = type(processor).__name__.removesuffix("Processor")
        raise ValueError(
            f"data.packing=true: models of the family {family} cannot train on packed rows; "
            "use data.packing=false, with data.group_by_length=true against padding"
        )


def empty_batch(pad_id: int, dropped: tuple[Dropped, ...] = ()) -> Batch:
    """Returns a padded batch without any row and without a supervised token.

    Its two tokens of padding allow a training step, so that no other rank blocks.
    """
    input_ids = torch.full((1, 2), pad_id)
    empty = torch.empty(0, dtype=torch.int64)
    return Batch(
        conversations=(),
        input_ids=input_ids,
        labels=torch.full_like(input_ids, IGNORED),
        attention_mask=torch.ones_like(input_ids),
        position_ids=None,
        lengths=(),
        vision_positions=empty,
        target_positions=empty,
        vision={},
        dropped=dropped,
    )


def target_positions(labels: torch.Tensor) -> torch.Tensor:
    """Returns flat indices (S,) into `labels` (B, T) of the tokens that predict a supervised one.

    Those are the tokens whose successor in the same row is supervised.

    >>> target_positions(torch.tensor([[-100, -100, 7, 8], [-100, 9, -100, -100]]))
    tensor([1, 2, 4])
    """
    predicts = torch.zeros_like(labels, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != IGNORED
    return predicts.flatten().nonzero().squeeze(1)


def _separate(rows: Sequence[Sample | Dropped]) -> tuple[list[Sample], tuple[Dropped, ...]]:
    """Returns the samples, and the reasons why the other rows were dropped."""
    samples, reasons = [], []
    for row in rows:
        if isinstance(row, Dropped):
            reasons.append(row)
        else:
            samples.append(row)
    return samples, tuple(reasons)


def _images_of(samples: Sequence[Sample]) -> tuple[ImageSource, ...]:
    return tuple(image for sample in samples for image in sample.images)


def _join_positions(
    samples: Sequence[Sample], starts: Sequence[int], width: int
) -> torch.Tensor | None:
    """Returns the `position_ids` (A, width) of samples that begin at `starts`, 0 elsewhere."""
    if not samples or samples[0].position_ids is None:
        return None
    joined = samples[0].position_ids.new_zeros(len(samples[0].position_ids), width)
    for sample, start in zip(samples, starts, strict=True):
        assert sample.position_ids is not None, "a family gives positions to all samples or to none"
        joined[:, start : start + sample.position_ids.shape[1]] = sample.position_ids
    return joined
